"""The log of what happened to a run."""

from __future__ import annotations

from pretrain.events import FILE, read_events, write_event


def test_events_come_back_in_order_and_a_torn_line_is_left_out(tmp_path):
    assert read_events(tmp_path) == []
    write_event(tmp_path, "start", 0, world_size=2)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": 1, "eve\n')
    write_event(tmp_path, "finished", 8)
    events = read_events(tmp_path)
    assert [(one["event"], one["global_step"]) for one in events] == [("start", 0), ("finished", 8)]
    assert events[0]["world_size"] == 2 and events[0]["time"] <= events[1]["time"]
