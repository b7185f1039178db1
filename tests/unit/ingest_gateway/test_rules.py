"""The gateway's pure rules: negotiation, conditions, ranges, routes, strict JSON, file names."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.documents.shapes import CreatePackageRequest
from artifact_store.errors import InvalidRequestError, RangeNotSatisfiableError
from ingest_gateway.app import ROUTES, Routes
from ingest_gateway.protocol.declaration import BINARY, Route, document
from ingest_gateway.protocol.http_errors import (
    BodyTimeoutError,
    IncompleteBodyError,
    MethodNotAllowedError,
    NotAcceptableError,
    PreconditionFailedError,
    UnknownResourceError,
)
from ingest_gateway.protocol.json_body import parse_json
from ingest_gateway.protocol.negotiation import choose, entity_tags, not_modified, requested
from ingest_gateway.routes.files import disposition

_OFFERED = ("application/cbor", "application/json")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/cbor"),
        ("", "application/cbor"),
        ("*/*", "application/cbor"),
        ("application/*", "application/cbor"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON;charset=utf-8", "application/json"),
        ("application/json;q=0.9, application/cbor;q=0.8", "application/json"),
        ("*/*;q=0.9, application/cbor;q=0.1", "application/json"),
        ("application/cbor;q=0, */*", "application/json"),
        ("text/html, application/xhtml+xml, */*;q=0.1", "application/cbor"),
    ],
)
def test_the_representation_that_is_liked_best_is_chosen(accept: str | None, chosen: str) -> None:
    assert choose(accept, _OFFERED) == chosen


@pytest.mark.parametrize(
    "accept", ["text/html", "*/*;q=0", "application/json;q=x", "json", ";;,", "application/json;q=2"]
)
def test_nothing_that_is_offered_may_be_acceptable(accept: str) -> None:
    with pytest.raises(NotAcceptableError):
        choose(accept, _OFFERED)


def test_lists_of_tags_are_read_and_what_is_none_is_not() -> None:
    assert entity_tags('"a", W/"b" ,"c,d"') == [(False, "a"), (True, "b"), (False, "c,d")]
    assert entity_tags(', "a",, ,W/"b",,') == [(False, "a"), (True, "b")]
    assert entity_tags("") == entity_tags(" , ") == []
    for bad in ("a", '"a" "b"', "*", 'w/"a"', '"a'):
        assert entity_tags(bad) is None


def test_if_none_match_is_weak_and_if_match_is_strong() -> None:
    assert not_modified(None, 'W/"t"', "t")
    assert not not_modified(None, '"other"', "t")
    assert not not_modified('"t"', None, "t")
    with pytest.raises(PreconditionFailedError):
        not_modified('W/"t"', '"t"', "t")


@given(size=st.integers(0, 50), first=st.integers(0, 60), last=st.one_of(st.none(), st.integers(0, 60)))
def test_a_range_is_what_slicing_gives(size: int, first: int, last: int | None) -> None:
    header = f"bytes={first}-{'' if last is None else last}"
    whole = bytes(range(size))
    if last is not None and last < first:
        assert requested(header, None, "t", size) is None
        return
    expected = whole[first : None if last is None else last + 1]
    if not expected:
        with pytest.raises(RangeNotSatisfiableError):
            requested(header, None, "t", size)
        return
    part = requested(header, None, "t", size)
    assert part is not None
    assert whole[part.offset : part.offset + part.length] == expected
    assert part.content_range == f"bytes {first}-{first + len(expected) - 1}/{size}"


@given(size=st.integers(0, 50), suffix=st.integers(0, 60))
def test_a_suffix_range_is_the_end(size: int, suffix: int) -> None:
    if not min(size, suffix):
        with pytest.raises(RangeNotSatisfiableError):
            requested(f"bytes=-{suffix}", None, "t", size)
        return
    part = requested(f"bytes=-{suffix}", None, "t", size)
    assert part is not None
    assert (part.offset, part.length) == (max(0, size - suffix), min(size, suffix))


def test_routes_are_found_by_raw_segments() -> None:
    routes = Routes(ROUTES)
    route, values = routes.find("PUT", "/v1/packages/x/files/a/../%2e%2e//b")
    assert (route.operation_id, values) == ("ingest_file", {"package_id": "x", "relative_path": "a/../%2e%2e//b"})
    assert routes.find("GET", "/v1/packages/x/files")[0].operation_id == "list_files"
    assert routes.find("GET", "/v1/packages/x/files/")[1]["relative_path"] == ""
    assert routes.find("HEAD", "/v1/files/y/content")[0].operation_id == "get_content"
    for path in ("", "/", "/v1/packages//", "/v1/packages/x/files2", "/v1/files//content", "v1/packages"):
        with pytest.raises(UnknownResourceError):
            routes.find("GET", path)
    with pytest.raises(MethodNotAllowedError) as refused:
        routes.find("HEAD", "/v1/packages/x/finalize")
    assert refused.value.headers == {"Allow": "POST"}


def test_a_route_has_to_say_who_may_call_it() -> None:
    access = next(declared for declared in fields(Route) if declared.name == "access")
    assert access.default is access.default_factory is MISSING


def test_every_template_names_exactly_its_path_parameters() -> None:
    for route in ROUTES:
        named = {part[1:-1] for part in route.template.split("/") if part.startswith("{")}
        assert named == {p.name for p in route.parameters if p.place == "path"}, route.template


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(metadata=st.dictionaries(st.text(), _values, max_size=3))
def test_lawful_json_is_read_as_it_is(metadata: dict[str, object]) -> None:
    body = {"name": "n", "producer": "p", "subject": "s", "retention_class": "c", "metadata": metadata}
    assert parse_json(json.dumps(body).encode(), CreatePackageRequest).metadata == metadata


@given(body=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_other_bytes_are_refused_as_a_bad_request(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_json(body, CreatePackageRequest)


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("a/b.txt", 'attachment; filename="b.txt"'),
        ('q"uo\\te', "attachment; filename=\"q_uo_te\"; filename*=UTF-8''q%22uo%5Cte"),
        ("日本", "attachment; filename=\"file\"; filename*=UTF-8''%E6%97%A5%E6%9C%AC"),
        ("a%20b;c", "attachment; filename=\"a_20b;c\"; filename*=UTF-8''a%2520b%3Bc"),
    ],
)
def test_a_file_name_cannot_break_out_of_its_header(path: str, header: str) -> None:
    assert disposition(path) == header


def test_every_body_may_break_off_or_come_too_slowly() -> None:
    for route in ROUTES:
        if route.body is not None:
            assert {BodyTimeoutError, IncompleteBodyError} <= set(route.problems), route.operation_id


def test_every_read_below_a_package_may_wait_for_the_view() -> None:
    for route in ROUTES:
        if route.method == "GET" and route.template.startswith("/v1/packages/{package_id}"):
            assert "wait_sequence" in {p.name for p in route.parameters if p.place == "query"}, route.template


def test_what_says_when_to_come_again_is_declared_with_it() -> None:
    for methods in json.loads(document(ROUTES))["paths"].values():
        for operation in methods.values():
            said = {
                status
                for status, answer in operation["responses"].items()
                if "Retry-After" in answer.get("headers", ())
            }
            assert said == {"423", "429", "503", "504"} & set(operation["responses"])


def test_what_moves_bytes_takes_a_place_of_its_kind() -> None:
    def takes_bytes(route: Route) -> bool:
        return route.body is not None and any(shape is BINARY for shape in route.body.content.values())

    uploads = {route.operation_id for route in ROUTES if route.transfer == "uploads"}
    assert uploads == {route.operation_id for route in ROUTES if takes_bytes(route)} | {"send_parts_directly"}
    downloads = {route.operation_id for route in ROUTES if route.transfer == "downloads"}
    assert downloads == {"get_content", "get_archive", "get_manifest"}
