"""Finding the route of a request by the raw segments of its target.

The framework's own router matches the decoded path, in which `%2e` and `%25` are no longer what the client sent; a
relative path has to be judged as it came (docs/decisions/http.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ingest_gateway.operations import Route
from ingest_gateway.problems import MethodNotAllowedError, UnknownResourceError

_REST = "{relative_path}"


class Routes:
    """The table of routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._resources: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self._resources.setdefault(route.template, {})
            if route.method in methods:
                raise ValueError(f"{route.method} {route.template} is there twice")
            methods[route.method] = route
        self._templates = [(template, template.split("/")) for template in self._resources]

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route and its raw path parameters; HEAD goes where GET does.

        Raises UnknownResourceError, MethodNotAllowedError.
        """
        segments = path.split("/")
        for template, parts in self._templates:
            values = _match(parts, segments)
            if values is None:
                continue
            methods = self._resources[template]
            route = methods.get("GET" if method == "HEAD" else method)
            if route is None:
                allow = sorted(methods.keys() | ({"HEAD"} if "GET" in methods else set()))
                raise MethodNotAllowedError(f"this resource takes {', '.join(allow)}", {"Allow": ", ".join(allow)})
            return route, values
        raise UnknownResourceError("there is no such resource; /openapi.json lists what there is")


def _match(parts: list[str], segments: list[str]) -> dict[str, str] | None:
    rest = parts[-1] == _REST
    if len(segments) < len(parts) or (len(segments) > len(parts) and not rest):
        return None
    values: dict[str, str] = {}
    for part, segment in zip(parts, segments, strict=False):
        if part.startswith("{") and part != _REST and not segment:
            return None
        if part.startswith("{"):
            values[part[1:-1]] = segment
        elif part != segment:
            return None
    if rest:
        values[_REST[1:-1]] = "/".join(segments[len(parts) - 1 :])
    return values
