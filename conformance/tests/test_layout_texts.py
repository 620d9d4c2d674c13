"""A layout has one text; another is refused in one sentence, wherever it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.messages import LayoutParts, RequestError, Start, request_of
from helix_conformance.drive.serve import Server, reply
from helix_conformance.expect.vectors import SHIPPED
from helix_spec.capabilities import boxes_of
from helix_spec.config import Config, encode_layout
from helix_spec.layouts import LayoutError

RIGHT = "pr9757/1:C=2,T=1"
OTHERS = {
    "pr9757/1:T=1,C=2": "in another order",
    "pr9757/1:C=02,T=1": "with a leading zero",
    "custom/1:prompt=contiguous,owner=step,pages=lazy,start=rank_zero,C=2,T=1": "with its rules",
}
CONFIG = Config(layout=RIGHT, pages=[3, 3], max_len=9)


def sentence(text: str) -> str:
    """What must be said of such a text."""
    return f"{text!r} is not canonical; this layout is written {RIGHT!r}"


@pytest.mark.parametrize("text", OTHERS)
def test_in_python(text: str) -> None:
    """A configuration and a declaration of capabilities are refused."""
    with pytest.raises(LayoutError) as refused:
        Config(layout=text, pages=[3, 3], max_len=9)
    assert str(refused.value) == f"{sentence(text)}."
    with pytest.raises(ValueError, match="declares no capabilities") as declared:
        boxes_of({"layouts": [text]})
    assert sentence(text) in str(declared.value)
    assert boxes_of({"layouts": [RIGHT, "pr9757/1:*"]})


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("command", [["show"], ["replay", "--engine", "reference"]])
def test_in_a_trace(tmp_path: Path, command: list[str], text: str) -> None:
    """The message names the file, the line and the field too."""
    path = tmp_path / "trace.json"
    config = msgspec.to_builtins(CONFIG, enc_hook=encode_layout) | {"layout": text}
    path.write_text(json.dumps({"format": "helix-trace/2", "config": config, "events": []}))
    result = CliRunner().invoke(main, [*command, str(path)])
    assert result.exit_code == 2
    assert f"line 1, field $.config.layout: {sentence(text)}." in result.output


@pytest.mark.parametrize("text", OTHERS)
def test_in_a_vector(tmp_path: Path, text: str) -> None:
    """No case of the folder is played."""
    stored = (SHIPPED / "skip.json").read_text()
    assert stored.count(f'"{RIGHT}"') >= 1
    (tmp_path / "skip.json").write_text(stored.replace(f'"{RIGHT}"', json.dumps(text)))
    command = ["vectors", "check", str(tmp_path), "--engine", "reference"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert sentence(text) in result.output


@pytest.mark.parametrize("text", OTHERS)
def test_on_the_wire(capfd: pytest.CaptureFixture[str], text: str) -> None:
    """A served engine refuses the start with `bad_config`, and can be started again."""
    server = Server("reference")
    start = Start(2, 0, 2, CONFIG, LayoutParts(**CONFIG.layout.parts()), ["placement"])
    line = msgspec.json.encode(start, enc_hook=encode_layout)
    spoiled = line.replace(f'"{RIGHT}"'.encode(), json.dumps(text).encode())
    refused = {"type": "outcome", "seq": 2, "reason": "bad_config"}
    assert json.loads(reply(server, spoiled)) == refused
    assert sentence(text) in capfd.readouterr().err
    assert json.loads(reply(server, line))["reason"] is None


def test_a_line_that_ends_behind_a_refused_layout_is_no_request() -> None:
    """What follows the layout may be cut off; then nobody knows whom to answer."""
    line = b'{"type":"start","seq":2,"config":{"layout":"pr9757/1:T=1,C=2","pages":[3'
    with pytest.raises(RequestError) as refused:
        request_of(line)
    assert type(refused.value) is RequestError
