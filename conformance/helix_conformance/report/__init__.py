"""What is made of a run's JSON stream: HTML page, JUnit file, certificate, badge; and pictures.

- `placement`: where a trace puts its tokens, event by event, as boxes on a plane;
- `pages`: those boxes, and whole runs, as SVG and HTML through the templates beside it;
- `stream`: the lines of the stream as types, their schema, and reading them back;
- `views`: JUnit, certificate and badge.
"""
