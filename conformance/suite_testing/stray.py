"""A command that stands before the C engine and goes astray, for tests of the stdio driver.

    python -m suite_testing.stray ENGINE HOW

It hands every line on. On rank 1, when the first decode comes, it does what HOW says.
"""

import json
import os
import signal
import subprocess
import sys
import time


def put(text):
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def flood(stream):
    """Write for ever, and no line."""
    while True:
        stream.write("x" * 65536)


def change(**fields):
    """An answer with other fields; None takes one away."""

    def changed(answer):
        merged = json.loads(answer) | fields
        put(json.dumps({name: v for name, v in merged.items() if v is not None}) + "\n")

    return changed


def twice(answer):
    """Say it twice."""
    put(answer + answer)


def half(answer):
    """Begin an answer and stop."""
    put(answer[:20])
    time.sleep(3600)


def closed(_answer):
    """Hang up without leaving."""
    os.close(1)
    time.sleep(3600)


def with_a_child(_answer):
    """Leave a child behind that keeps every pipe open, and hang."""
    subprocess.Popen(["sleep", "3600"])
    time.sleep(3600)


ASTRAY = {
    "wrong seq": change(seq=1),
    "wrong type": change(type="view"),
    "no such type": change(type="oops"),
    "no slots": change(slots=None),
    "extra": change(slot=[1]),
    "text": change(past_len=["3"]),
    "huge": change(slots=[10**30]),
    "reason": change(reason="no room"),
    "failed": lambda a: put(
        json.dumps({"type": "failed", "seq": json.loads(a)["seq"], "what": "lost its way"}) + "\n"
    ),
    "chatter": lambda a: put("loading weights...\n" + a),
    "deep": lambda _: put("[" * 100000 + "\n"),
    "not utf-8": lambda _: os.write(1, b'{"type":"\xff\xfe"}\n'),
    "twice": twice,
    "half": half,
    "closed": closed,
    "hang": lambda _: time.sleep(3600),
    "with a child": with_a_child,
    "exit": lambda _: sys.exit(0),
    "crash": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "odd signal": lambda _: os.kill(os.getpid(), 40),
    "flood stdout": lambda _: flood(sys.stdout),
    "flood stderr": lambda _: flood(sys.stderr),
}


def main(engine, how):
    """Hand lines on until it is time to go astray."""
    child = subprocess.Popen([engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rank = None
    for line in sys.stdin:
        child.stdin.write(line)
        child.stdin.flush()
        answer, request = child.stdout.readline(), json.loads(line)
        rank = request.get("rank", rank)
        if how.startswith("ready: ") and request["type"] == "hello":
            put(json.dumps(json.loads(answer) | json.loads(how.removeprefix("ready: "))) + "\n")
        elif rank == 1 and request.get("event", {}).get("event") == "decode" and how in ASTRAY:
            print(f"going astray: {how}", file=sys.stderr, flush=True)
            ASTRAY[how](answer)
        else:
            put(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
