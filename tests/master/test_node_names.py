"""`--nodes` means the same in every tool: names, ranges, files; anything odd is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from master.ssh.node_names import MAX_NODES, Node, NodeError, read_nodes


@pytest.mark.parametrize(("words", "expected"), [
    (["gpu1"], ["gpu1"]),
    (["gpu1,gpu2", " 10.0.0.3  gpu4 "], ["gpu1", "gpu2", "10.0.0.3", "gpu4"]),
    (["gpu[08-11,3]"], ["gpu08", "gpu09", "gpu10", "gpu11", "gpu3"]),
    (["admin@r[1-2]n[1,3]:2222"], ["admin@r1n1:2222", "admin@r1n3:2222", "admin@r2n1:2222", "admin@r2n3:2222"]),
    (["::1", "[fe80::2%eth0]:22", "root@[::2]"], ["::1", "[fe80::2%eth0]:22", "root@::2"]),
    (["localhost", "user@localhost"], ["localhost", "user@localhost"]),
])
def test_nodes_are_read(words: list[str], expected: list[str]) -> None:
    nodes = read_nodes(words)
    assert [str(node) for node in nodes] == expected
    assert read_nodes([str(node) for node in nodes]) == nodes


def test_only_plain_localhost_is_this_machine() -> None:
    assert [node.is_local for node in read_nodes(["localhost", "me@localhost", "127.0.0.1"])] == [True, False, False]


def test_a_file_has_comments_and_many_a_line(tmp_path: Path) -> None:
    path = tmp_path / "nodes.txt"
    path.write_text("# my lab\ngpu[1-2]  # the old ones\n\nadmin@gpu3, gpu4\n")
    assert [node.host for node in read_nodes([f"@{path}"])] == ["gpu1", "gpu2", "gpu3", "gpu4"]
    path.write_text("gpu1\n; rm\n")
    with pytest.raises(NodeError, match=r"nodes.txt:2: ';' is no host name"):
        read_nodes([f"@{path}"])
    path.write_text("@nodes.txt\n")
    with pytest.raises(NodeError, match="is no"):
        read_nodes([f"@{path}"])


@pytest.mark.parametrize(("words", "message"), [
    ([], "no nodes"), ([" , "], "no nodes"), (["@/nowhere"], "/nowhere: No such file"),
    (["; touch x"], "';' is no host name"), (["-oProxyCommand=x"], "is no host name"),
    (["--", "gpu1"], "is no host name"),
    (["gpu1\ngpu2\x00"], "is no host name"), (["gpü"], r"'gp\\xfc' is no host name"), (["$(id)"], "is no host name"),
    (["a b\x1b[31m"], r"x1b"), (["-u@gpu1"], "is no user name"), (["a'b@gpu1"], "is no user name"),
    (["gpu1:0"], "is no port"), (["gpu1:ssh"], "is no port"), (["gpu1:70000"], "is no port"),
    (["1:2:3"], "nor an IPv6 address"), (["fe80::1%;x"], "is no network interface"),
    (["gpu[3-1]"], "runs backwards"), (["gpu[1-]"], "a range is written"), (["gpu[a-b]"], "is no host name"),
    (["[1-2x]"], "a range is written"), (["gpu[1-1025]"], "names 1,025 nodes"),
    (["g[1-99]h[1-99]"], "names 9,801 nodes"),
    (["gpu[1-999999999]"], "names 999,999,999 nodes"), (["gpu1", "gpu1"], "named twice"),
    (["gpu1,gpu[1-2]"], "named twice"), (["a" * 254], "is no host name"),
])
def test_what_is_no_node_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(NodeError, match=message) as caught:
        read_nodes(words)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_there_is_a_most() -> None:
    assert len(read_nodes([f"gpu[1-{MAX_NODES}]"])) == MAX_NODES
    with pytest.raises(NodeError, match="more than 1024 nodes"):
        read_nodes([f"gpu[1-{MAX_NODES}]", "one-more"])


@given(st.text())
def test_any_text_is_nodes_or_an_error(text: str) -> None:
    try:
        nodes = read_nodes([text.replace("@", "")])
    except NodeError:
        return
    assert all(isinstance(node, Node) and not node.host.startswith("-") and node.host.isascii() for node in nodes)
