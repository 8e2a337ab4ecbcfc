"""Ids of executions, alone and by thousands."""

from itertools import pairwise
from uuid import RFC_4122, UUID

from pgconductor.ids import new_id, new_ids

SEVERAL_MILLISECONDS = 10_000  # a millisecond has 4,096 ids


def test_an_id_is_the_canonical_text_of_a_uuid_of_version_7() -> None:
    for id_ in [new_id(), *new_ids(SEVERAL_MILLISECONDS)]:
        read = UUID(id_)
        assert (str(read), read.version, read.variant) == (id_, 7, RFC_4122)


def test_ids_rise_within_a_batch_and_from_batch_to_batch() -> None:
    ids = [*new_ids(SEVERAL_MILLISECONDS), new_id(), *new_ids(3)]
    assert all(earlier < later for earlier, later in pairwise(ids))


def test_ids_begin_with_the_time_and_end_at_random() -> None:
    ids = new_ids(2_000)
    assert len({id_[:8] for id_ in ids}) <= 2
    assert len({id_[19:] for id_ in ids}) == len(ids)
