"""Damage to events and blobs that the oracle must find, each by exactly one check.

Damage to views and to the embedded log's file is in `test_damage.py`, which checks that all are found.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from uuid import uuid4

from blake3 import blake3

from artifact_store.errors import CorruptError
from artifact_store.events import DELEGATED_FILE_INGESTED, DELEGATED_PACKAGE_CREATED, Event
from artifact_store.manifest import content_key
from services.log.port import Batch, Record
from services.log.records import AdministrativeHead
from tests.memory_log import MemoryLog, skip_of
from tests.verify_scene import CONTENT, Scene, chained, changed, put_blob

Act = Callable[[Scene], Awaitable[None] | None]

DAMAGES: list[tuple[str, str, Act, bool]] = []
"""Kind, what is done, how, and whether bytes have to be read to see it."""


def damage(kind: str, *, check_bytes: bool = False) -> Callable[[Act], Act]:
    """Registers one way of damage; the function's name says which."""

    def register(act: Act) -> Act:
        name = getattr(act, "__name__", "").replace("_", " ")
        DAMAGES.append((kind, name, act, check_bytes))
        return act

    return register


def at(scene: Scene, index: int, event: Event) -> None:
    """Put another event in the place of one, in the chain, and leave the package open if it is a file's."""
    events = scene.open if index < 4 else scene.events
    scene.events = chained([*events[:index], event, *events[index + 1 :]])


class TornLog(MemoryLog):
    """A log that has lost what came behind its last record."""

    async def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        async for batch in super().scan(starts, ends):
            yield batch
        raise CorruptError("records are gone")


@damage("gone")
def records_are_gone(scene: Scene) -> None:
    scene.log = TornLog()


@damage("undecodable")
def a_record_is_no_event(scene: Scene) -> None:
    scene.log.append_raw(0, b"\x00")


@damage("administrative")
def administrative_records_of_a_partition_are_not_numbered_in_order(scene: Scene) -> None:
    bad = Record(0, 0, b"", b"not there any more")
    for after in (None, AdministrativeHead(7, bytes(32))):
        scene.log.append_administrative(skip_of(scene.log, bad, after))


@damage("partition")
def an_event_lies_in_another_partition(scene: Scene) -> None:
    scene.misplaced = [scene.events.pop()]


@damage("key")
def a_record_has_the_key_of_another_package(scene: Scene) -> None:
    scene.keys[scene.events[1].event_id] = str(uuid4()).encode()


@damage("created-at")
def an_event_is_older_than_the_one_before_it(scene: Scene) -> None:
    at(scene, 2, replace(scene.events[2], created_at=7))


@damage("sequence")
def a_number_is_left_out(scene: Scene) -> None:
    events = [replace(event, sequence=event.sequence + (event.sequence > 2)) for event in scene.open]
    scene.events = chained(events, numbered=False)


@damage("repeated-event")
def an_event_of_a_number_that_is_taken_has_another_content(scene: Scene) -> None:
    scene.again.append(replace(scene.events[1], actor="eve", created_at=scene.events[-1].created_at))


@damage("chain")
def a_link_is_broken(scene: Scene) -> None:
    scene.events[2] = replace(scene.events[2], previous_digest=bytes(32))


@damage("chain")
def an_event_has_another_actor_than_when_it_was_linked(scene: Scene) -> None:
    scene.events[1] = replace(scene.events[1], actor="eve")


@damage("chain")
def a_sender_was_put_beside_the_actor_later(scene: Scene) -> None:
    scene.events[1] = replace(scene.events[1], event_type=DELEGATED_FILE_INGESTED, principal="eve")


@damage("command-order")
def a_command_has_two_senders(scene: Scene) -> None:
    second = replace(scene.events[2], event_type=DELEGATED_FILE_INGESTED, principal="bob")
    third = replace(scene.events[3], event_type=DELEGATED_FILE_INGESTED, principal="eve")
    scene.events = chained([*scene.events[:2], second, third])


@damage("package-id")
def a_package_id_is_derived_from_the_actor_in_place_of_the_sender(scene: Scene) -> None:
    made = replace(scene.events[0], event_type=DELEGATED_PACKAGE_CREATED, principal="eve")
    scene.events = chained([made, *scene.open[1:]])


@damage("event-id")
def an_event_id_is_drawn(scene: Scene) -> None:
    scene.events[1] = replace(scene.events[1], event_id=uuid4())


@damage("creation")
def a_package_begins_with_a_file(scene: Scene) -> None:
    scene.events = chained(scene.open[1:])


@damage("creation")
def a_package_is_created_twice(scene: Scene) -> None:
    again = replace(scene.events[0], command_id=uuid4(), created_at=4_000)
    scene.events = chained([*scene.open, again])


@damage("after-finalized")
def a_file_comes_after_the_finalization(scene: Scene) -> None:
    late = changed(scene.events[1], relative_path="late")
    scene.events = chained([*scene.events, replace(late, command_id=uuid4(), created_at=9_000)])


@damage("torn-command")
def the_second_event_of_a_command_is_gone(scene: Scene) -> None:
    late = replace(changed(scene.events[1], relative_path="late"), command_id=uuid4(), created_at=9_000)
    scene.events = chained([*scene.events[:3], late])


@damage("repeated-command")
def a_command_was_applied_twice(scene: Scene) -> None:
    again = replace(changed(scene.events[1], relative_path="again"), created_at=9_000)
    scene.events = chained([*scene.open, again])


@damage("command-order")
def an_event_has_the_index_of_another(scene: Scene) -> None:
    at(scene, 3, replace(scene.events[3], command_index=0))


@damage("command-order")
def a_command_has_no_events(scene: Scene) -> None:
    at(scene, 1, replace(scene.events[1], command_count=0))


@damage("command-order")
def a_command_has_less_than_no_events(scene: Scene) -> None:
    at(scene, 1, replace(scene.events[1], command_count=-7))


@damage("command-order")
def a_finalization_is_of_a_command_of_no_events(scene: Scene) -> None:
    at(scene, 4, replace(scene.events[4], command_count=0))


@damage("unfinished-command")
def the_history_ends_within_a_command(scene: Scene) -> None:
    scene.events = scene.events[:3]


@damage("package-id")
def a_package_id_is_drawn(scene: Scene) -> None:
    made = uuid4()
    scene.events = chained([replace(scene.events[0], package_id=made)])


@damage("payload-digest")
def a_payload_has_another_digest(scene: Scene) -> None:
    at(scene, 1, replace(scene.events[1], payload_digest=bytes(32)))


@damage("metadata")
def metadata_is_no_object(scene: Scene) -> None:
    at(scene, 0, changed(scene.events[0], metadata="[]"))


@damage("metadata")
def metadata_is_not_canonical(scene: Scene) -> None:
    at(scene, 0, changed(scene.events[0], metadata='{"k": "v"}'))


@damage("retention")
def a_class_stood_for_less_than_no_time(scene: Scene) -> None:
    at(scene, 0, changed(scene.events[0], retention_days=-1))


@damage("path")
def a_path_climbs(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], relative_path="../a"))


@damage("duplicate-path")
def a_path_is_there_twice(scene: Scene) -> None:
    at(scene, 2, changed(scene.events[2], relative_path="a"))


@damage("file-id")
def a_file_id_is_drawn(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], file_id=uuid4()))


@damage("location-id")
def a_location_id_is_drawn(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], location_id=uuid4()))


@damage("receipt")
def a_receipt_is_for_fewer_bytes(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], size_bytes=len(CONTENT["a"]) + 1))


@damage("manifest-address")
def a_manifest_has_another_address(scene: Scene) -> None:
    at(scene, 4, replace(scene.events[4], payload_digest=bytes(32)))


@damage("manifest")
def a_manifest_is_another(scene: Scene) -> None:
    at(scene, 4, changed(scene.events[4], manifest=b"\xa0"))


@damage("manifest-form")
def a_manifest_is_nowhere(scene: Scene) -> None:
    at(scene, 4, changed(scene.events[4], manifest=None))


@damage("manifest-key")
def a_claim_check_leads_to_a_key_that_is_not_its_address(scene: Scene) -> None:
    put_blob(scene.folder, "uploads/manifest", scene.events[4].payload.manifest)  # type: ignore[union-attr, arg-type]
    at(scene, 4, changed(scene.events[4], manifest=None, manifest_key="uploads/manifest"))


@damage("manifest-totals")
def a_finalization_counts_another_number_of_files(scene: Scene) -> None:
    at(scene, 4, changed(scene.events[4], file_count=2))


@damage("decide")
def an_actor_that_no_command_may_have(scene: Scene) -> None:
    at(scene, 1, replace(scene.events[1], actor="a\x07"))


@damage("decide")
def a_media_type_that_no_command_may_have(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], media_type=""))


@damage("decide")
def a_name_that_no_command_may_have(scene: Scene) -> None:
    at(scene, 0, changed(scene.events[0], name="n" * 257))


@damage("decide")
def a_class_that_has_no_name(scene: Scene) -> None:
    at(scene, 0, changed(scene.events[0], retention_class=""))


@damage("backend")
def a_blob_lies_in_another_backend(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], backend_id="s3"))


@damage("blob-key")
def a_key_climbs(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], key="../a"))


@damage("blob-missing")
def a_blob_is_gone(scene: Scene) -> None:
    scene.blob("a").unlink()


@damage("blob-missing")
def a_key_has_a_longer_name_than_a_file_can_have(scene: Scene) -> None:
    scene.blob("a").unlink()
    at(scene, 1, changed(scene.events[1], key="blobs/" + "k" * 300))


@damage("blob-missing")
def a_manifest_by_claim_check_is_gone(scene: Scene) -> None:
    key = content_key(scene.events[4].payload_digest)
    at(scene, 4, changed(scene.events[4], manifest=None, manifest_key=key))


@damage("blob-damaged")
def a_blob_is_short(scene: Scene) -> None:
    scene.blob("a").write_bytes(b"fir")


@damage("blob-damaged")
def a_blob_is_longer_than_its_key_says(scene: Scene) -> None:
    scene.blob("a").write_bytes(CONTENT["a"] + b"!")


@damage("blob-damaged", check_bytes=True)
def a_blob_has_other_bytes(scene: Scene) -> None:
    scene.blob("a").write_bytes(b"FIRST")


@damage("blob-damaged", check_bytes=True)
def a_manifest_by_claim_check_has_other_bytes(scene: Scene) -> None:
    manifest: bytes = scene.events[4].payload.manifest  # type: ignore[union-attr, assignment]
    key = content_key(blake3(manifest).digest())
    put_blob(scene.folder, key, manifest[:-1] + b"?")
    at(scene, 4, changed(scene.events[4], manifest=None, manifest_key=key))


@damage("blob-damaged", check_bytes=True)
def a_pack_has_other_bytes_between_its_files(scene: Scene) -> None:
    pack = CONTENT["a"] + b"between"
    key = content_key(blake3(pack).digest())
    put_blob(scene.folder, key, CONTENT["a"] + b"BETWEEN")
    at(scene, 1, changed(scene.events[1], key=key))


@damage("blob-claim", check_bytes=True)
def an_event_claims_other_digests_for_the_blob_of_another(scene: Scene) -> None:
    at(scene, 1, changed(scene.events[1], blake3=bytes(32)))
