"""The federation on one machine: its keys, its data, its processes and what it prints."""

import json
import ssl
import stat
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)

from benchmarks import federation
from benchmarks.federating import silos
from benchmarks.federating.authority import Authority, make_authority, masks_sections
from benchmarks.federating.lab import Lab
from pfm_llm.base.errors import LaunchError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.node.site import load_site

RECORD = {
    "round": 1,
    "loss": 2.5,
    "num_clients": 9,
    "nodes": 3,
    "refused": 1,
    "seconds": 1.25,
    "bytes_up": 3_000_000,
    "bytes_down": 6_000_000,
}


def greets(server: Authority, trusted: Authority) -> bool:
    """Whether a TLS connection to a server with these keys stands, for a client of an authority."""
    at_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    at_server.load_cert_chain(server.certificate, server.key)
    at_client = ssl.create_default_context(cafile=str(trusted.root))
    ends = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    client = at_client.wrap_bio(*ends[0], server_hostname="127.0.0.1")
    peer = at_server.wrap_bio(*ends[1], server_side=True)
    for _ in range(4):
        for side, source, sink in ((client, ends[1], ends[0]), (peer, ends[0], ends[1])):
            sink[0].write(source[1].read())
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return client.version() is not None


def test_the_keys_of_a_federation_are_private_and_verify(tmp_path: Path) -> None:
    keys, others = (make_authority(tmp_path / name, ("n01",)) for name in ("a", "b"))
    assert greets(keys, keys)
    assert not greets(keys, others)
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700
    own = load_ssh_private_key(keys.private("n01").read_bytes(), None)
    public = load_ssh_public_key(keys.public("n01").read_bytes())
    assert own.public_key() == public


def test_every_user_is_in_one_silo_and_all_have_the_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = Catalogue(("i0", "i1"), {"title": ("A, the", "B"), "year": ("1990", "")})
    data = Interactions(
        catalogue,
        ("u0", "u1", "u2"),
        np.array([0, 2, 3, 4]),
        np.array([1, 0, 0, 1]),
        np.array([5, 6, 7, 8]),
        np.array([4, 3, 5, 1]),
    )
    monkeypatch.setattr(silos, "load_interactions", lambda *_, **__: (data, LoadReport))
    found = silos.write_silos(tmp_path, ("n01", "n02"))
    assert found.items.read_text().splitlines() == [
        "item_id,title,year",
        'i0,"A, the",1990',
        "i1,B,",
    ]
    rows = [found.of(node).read_text().splitlines() for node in found.nodes]
    assert rows[0][1:] == ["u0,i1,5,4.0", "u0,i0,6,3.0", "u2,i1,8,1.0"]
    assert rows[1][1:] == ["u1,i0,7,5.0"]
    assert sorted(found.everybody.read_text().splitlines()[1:]) == sorted(rows[0][1:] + rows[1][1:])
    site = load_site(found.write_site("n01", threads=1))
    assert (site.data.source, site.threads) == (str(found.of("n01")), 1)


def test_a_lab_ends_what_it_started_and_what_that_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grandchild has a session of its own, as Flower's have."""
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    lab = Lab(tmp_path, Authority(tmp_path), {})
    monkeypatch.setattr(Lab, "_start_superlink", lambda self: None)
    with lab:
        lab._start("parent", [sys.executable, "-c", program])
        pids = json.loads((tmp_path / "pids.json").read_text())
        while not (child := (tmp_path / "parent.log").read_text().strip()):
            time.sleep(0.05)
        assert psutil.pid_exists(int(child))
    assert not psutil.pid_exists(pids["parent"])
    assert not psutil.pid_exists(int(child))
    assert not (tmp_path / "pids.json").exists()


def test_a_process_that_ends_early_is_named_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Lab) -> None:
        self._start("superlink", [sys.executable, "-c", "raise SystemExit('no such option')"])
        self._wait(lambda: False, "the SuperLink")

    monkeypatch.setattr(Lab, "_start_superlink", start)
    with pytest.raises(LaunchError, match=r"superlink has ended; see .*superlink\.log"):
        Lab(tmp_path, Authority(tmp_path), {}).__enter__()
    assert "no such option" in (tmp_path / "superlink.log").read_text()


def test_a_process_may_end_early_where_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "_start_superlink", lambda self: None)
    with Lab(tmp_path, Authority(tmp_path), {}, may_end=["n03.worker"]) as lab:
        for name in ("n03.worker", "n02.worker"):
            lab._start(name, [sys.executable, "-c", "pass"])
            lab._processes[name].wait()
            if name == "n03.worker":
                lab._check_alive()
        with pytest.raises(LaunchError, match=r"n02\.worker has ended"):
            lab._check_alive()


def test_a_process_is_killed_alone_and_started_again_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "_start_superlink", lambda self: None)
    with Lab(tmp_path, Authority(tmp_path), {}) as lab:
        for name in ("n01.supernode", "n02.supernode"):
            lab._start(name, [sys.executable, "-c", "import time; time.sleep(600)"])
        first, other = lab.pid("n01.supernode"), lab.pid("n02.supernode")
        lab.kill("n01.supernode")
        assert not lab.is_alive("n01.supernode")
        assert not psutil.pid_exists(first)
        lab._check_alive()  # it was meant
        lab.restart("n01.supernode")
        again = lab.pid("n01.supernode")
        assert psutil.Process(again).cmdline()[-1].endswith("sleep(600)")
        assert lab.is_alive("n02.supernode")
    assert not any(map(psutil.pid_exists, (again, other)))


def test_what_each_site_says_of_masks_names_the_keys_of_the_others(tmp_path: Path) -> None:
    folders = {node: tmp_path / node for node in ("n01", "n02", "n03")}
    found = masks_sections(folders)
    assert found == masks_sections(folders)  # a key is made once
    keys = [found["n02"]["peers"]["n01"], found["n01"]["peers"]["n02"]]
    assert found["n03"] == {"name": "n03", "peers": {"n01": keys[0], "n02": keys[1]}}
    assert len(set(keys)) == 2


def test_a_round_is_one_line_and_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = federation.Watch(tmp_path, 2)
    watch.show()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(RECORD)
    watch.show()
    watch.show()
    log.append({**RECORD, "round": 2, "loss": None})
    watch.show()
    assert capsys.readouterr().out.splitlines() == [
        "round 1/2: loss 2.5000, 9 clients of 3 nodes (1 refused), 1.2 s, 3.0 MB up, 6.0 MB down",
        "round 2/2: no loss, 9 clients of 3 nodes (1 refused), 1.2 s, 3.0 MB up, 6.0 MB down",
    ]


def test_the_summary_names_baselines_by_their_own_name() -> None:
    def row(method: str, mode: str, metric: str = "ndcg") -> dict[str, Any]:
        figures = {"value": 0.25, "ci_low": 0.2, "ci_high": 0.3, "num_users": 9}
        return {
            "method": method,
            "mode": mode,
            "metric": metric,
            "k": 10,
            "split": "test",
            **figures,
        }

    rows = [row("pfm", "shared_only"), row("popularity", "none"), row("pfm", "shared_only", "mrr")]
    result = {"rows": rows, "seconds_of_rounds": [1.0, 2.0], "run_seconds": 9.0}
    text = federation.summary({**result, "update_relative_difference": 1e-8})
    assert text.splitlines() == [
        "rounds: 1.0, 2.0 s; the whole run 9 s with workers up",
        "update of the last round against one process: 1.0e-08",
        "shared_only     ndcg@10 0.2500 [0.2000, 0.3000] on test, 9 users",
        "popularity      ndcg@10 0.2500 [0.2000, 0.3000] on test, 9 users",
    ]
