"""What a run found, shown: all of it is in the JSON stream first, and everything else reads that.

- `stream`: the lines of the stream as types, their schema, the writer, and reading them back;
- `text`: tables, failures and traces on the terminal;
- `diagram`: where a trace puts its tokens, event by event, and which answers were wrong there;
- `html`: diagrams and whole runs as pages, and the README's picture, through `templates/`;
- `junit`, `certificate`: files for other programs, a badge among them;
- `command`: `helix-conformance report`.

Modules import from those above them in this list.
"""
