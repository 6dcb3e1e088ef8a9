"""cluster.json: changed by several tools at once, and nothing that is known of a host is lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from master.inventory import cluster_file
from master.inventory.cluster_file import (
    ClusterError,
    known_by_name,
    merge_hosts,
    read_cluster,
    update_cluster,
    with_logins,
)
from master.ssh.node_names import parse_node
from master.ssh.route import SshOptions


def host(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "reached": {"user": None, "port": None, "way": "paramiko"}, "address": "10.0.0.1",
            "host_key": None, "macs": [], "report": {}, "facts": {}, "dir": None, "python": None, "read_at": 1.0,
            **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    update_cluster(path, lambda cluster: merge_hosts(cluster, [host("gpu1", dir="/a", python="/a/python"),
                                                               host("gpu2", dir="/b")]))
    return path


def test_a_host_that_is_off_keeps_its_folder_and_python(path: Path) -> None:
    cluster = update_cluster(path, lambda cluster: merge_hosts(cluster, [host("gpu2")]))
    assert [each["name"] for each in cluster["hosts"]] == ["gpu2"]
    assert known_by_name(cluster)["gpu1"]["python"] == "/a/python"
    cluster = update_cluster(path, lambda cluster: merge_hosts(cluster, [host("gpu1"), host("gpu2")]))
    assert [(each["name"], each["dir"]) for each in cluster["hosts"]] == [("gpu1", "/a"), ("gpu2", "/b")]
    assert not cluster["absent"] and read_cluster(path) == cluster


def test_changes_at_once_are_all_kept(path: Path) -> None:
    def note(number: int) -> None:
        def change(cluster: dict[str, Any]) -> dict[str, Any]:
            cluster["hosts"][0]["facts"][f"fact {number}"] = number
            return cluster

        update_cluster(path, change)

    threads = [threading.Thread(target=note, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_cluster(path)["hosts"][0]["facts"]) == 20


def test_other_times_of_reading_change_nothing(path: Path) -> None:
    before = path.stat().st_mtime_ns
    update_cluster(path, lambda cluster: {**cluster, "hosts": [{**each, "read_at": 9.0} for each in cluster["hosts"]]})
    assert path.stat().st_mtime_ns == before


def test_a_lock_that_nobody_gives_back_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_file, "LOCK_LIMIT_S", 0.1)
    with FileLock(path.with_name(".cluster.json.lock")), pytest.raises(ClusterError, match="another tool has locked"):
        update_cluster(path, lambda cluster: cluster)


def test_a_host_is_reached_as_before_unless_a_flag_says_otherwise(path: Path) -> None:
    reached = {"user": "me", "port": 2222, "key": "/keys/lab", "way": "paramiko"}
    cluster = update_cluster(path, lambda cluster: merge_hosts(cluster, [host("gpu1", reached=reached)]))
    ssh = with_logins(SshOptions(), cluster)
    found = ssh.for_node(parse_node("gpu1"))
    assert (found.user, found.port, found.key) == ("me", 2222, Path("/keys/lab"))
    typed = with_logins(SshOptions(user="root", key=Path("/other")), cluster).for_node(parse_node("gpu1"))
    assert (typed.user, typed.port, typed.key) == ("root", 2222, Path("/other"))
    assert ssh.for_node(parse_node("gpu9")) == ssh


@pytest.mark.parametrize("user", ["-oProxyCommand=id", "a b", "a;id"])
def test_a_user_name_that_could_be_a_flag_is_refused(path: Path, user: str) -> None:
    cluster = json.loads(path.read_text())
    cluster["hosts"][0]["reached"]["user"] = user
    path.write_text(json.dumps(cluster))
    with pytest.raises(ClusterError, match=r"reached\.user"):
        read_cluster(path)
