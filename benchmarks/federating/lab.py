"""The processes of a federation on Flower, on this machine: started, watched, ended by their ids.

It imports no flwr: it starts Flower's commands, which lie beside the Python that runs this.
"""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.federating.authority import Authority
from pfm_llm.base.errors import LaunchError, NodeError
from pfm_llm.node.client import NodeClient
from pfm_llm.node.site import load_site

ROOT = Path(__file__).resolve().parents[2]
_APP = ROOT / "flower_app"
_CONNECTION = "lab"
_BIN = Path(sys.executable).parent
_START_SECONDS, _END_SECONDS, _POLL_SECONDS = 300.0, 20.0, 0.5
_VARIABLES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def flower_is_installed() -> bool:
    """Whether Flower's commands lie beside this Python."""
    return (_BIN / "flower-superlink").exists()


class Lab:
    """A SuperLink with TLS and node authentication, and a worker and a SuperNode for each site.

    Args:
        folder: Logs, ids of processes, Flower's own files. It must be private.
        keys: Keys of the server and of each site.
        sites: Name of each node to its ``site.yaml``.
        may_end: Processes that may end before the others, such as ``n03.worker``.

    Attributes:
        variables: The environment of all processes.

    Example:
        >>> with Lab(folder, keys, sites) as lab:  # doctest: +SKIP
        ...     lab.run("server.yaml", print)
    """

    def __init__(
        self,
        folder: Path,
        keys: Authority,
        sites: Mapping[str, Path],
        may_end: Collection[str] = (),
    ) -> None:
        self._folder, self._keys, self._sites = folder, keys, dict(sites)
        self._may_end = frozenset(may_end)
        self._port = _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._family: set[psutil.Process] = set()
        self.variables = {**os.environ, **_VARIABLES, "FLWR_HOME": str(folder / "flower")}
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.variables["PYTHONPATH"] = os.pathsep.join(path)
        # Flower's commands start each other by name.
        self.variables["PATH"] = os.pathsep.join([str(_BIN), os.environ.get("PATH", "")])

    def __enter__(self) -> Self:
        try:
            self._start_workers()
            self._start_superlink()
            self._start_supernodes()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, config: Path, on_wait: Callable[[], None], timeout: float, **keys: Any) -> None:
        """Submit a run and wait for its end.

        Args:
            config: The experiment of the server.
            on_wait: Called twice a second, to show what has happened.
            timeout: Seconds that a node has for an answer.
            keys: Further keys of the run's config; see `pfm_llm.flower.server_app`.

        Raises:
            LaunchError: The run was not accepted, or has failed; its log says why.
        """
        names = " ".join(self._sites)
        tree = {"config": str(config), "nodes": names, "timeout": timeout, **keys}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in tree.items())
        found = self._flwr("run", str(_APP), _CONNECTION, "-c", words, "--format", "json")
        number = str(found["run-id"])
        while (status := self._status(number, on_wait)).partition(":")[0] != "finished":
            self._check_alive()
        if status != "finished:completed":
            raise LaunchError(f"the run ended as {status}; see {self._log('run')}")

    def supernode(self, node: str, socket_path: Path) -> list[str]:
        """The command of a SuperNode.

        Args:
            node: Whose key it authenticates itself with.
            socket_path: The socket of its worker.
        """
        words = [str(_BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{self._port}"]
        words += ["--root-certificates", str(self._keys.root)]
        words += ["--auth-supernode-private-key", str(self._keys.private(node))]
        words += ["--host", "127.0.0.1", "--port", str(_free_port())]
        return [*words, "--node-config", f"socket={json.dumps(str(socket_path))}"]

    def worker(self, node: str, site: Path) -> list[str]:
        """The command of a worker.

        Args:
            node: Its node.
            site: The node's ``site.yaml``.
        """
        return [sys.executable, "-m", "pfm_llm.cli", "node", "serve", str(site)]

    def pid(self, name: str) -> int:
        """The id of a process, such as ``superlink``, ``n01.worker`` or ``n01.supernode``."""
        return self._processes[name].pid

    def is_alive(self, name: str) -> bool:
        """Whether a process runs that was started and not killed."""
        return name in self._processes and self._processes[name].poll() is None

    def kill(self, name: str) -> None:
        """Kill a process by its id, and wait for its end; what it has started lives on."""
        self._remember_families()
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def restart(self, name: str) -> None:
        """Start a process again that was killed or has ended; `wait_for` it."""
        self._start(name, self._commands[name])

    def wait_for(self, name: str) -> None:
        """Wait until a worker answers, or the SuperLink listens.

        Raises:
            LaunchError: It does not start.
        """
        node, _, kind = name.partition(".")
        if kind == "worker":
            path = load_site(self._sites[node]).socket_path
            client = NodeClient(path, timeout=_START_SECONDS)
            self._wait(functools.partial(_answers, client), f"the worker of {node}")
        else:
            self._wait(lambda: _listens(self._port), "the SuperLink")

    def num_online(self) -> int:
        """How many nodes the SuperLink takes for online."""
        found = self._flwr("supernode", "list", _CONNECTION, "--format", "json")
        return sum(one["status"] == "online" for one in found["nodes"])

    def end_runs(self) -> None:
        """Stop all runs, and wait until the processes of their ServerApps are gone."""
        for one in self._flwr("list", _CONNECTION, "--format", "json")["runs"]:
            if not str(one["status"]).startswith("finished"):
                self._flwr("stop", str(one["run-id"]), _CONNECTION, "--format", "json")
        self.wait_for_server_apps()

    def wait_for_server_apps(self) -> None:
        """Wait until no ServerApp runs, as before a run is submitted again.

        Raises:
            LaunchError: One goes on.
        """
        self._wait(lambda: not any(map(_is_server_app, self._family)), "the end of a ServerApp")

    def stop(self) -> None:
        """End every process that this lab has started, and what these have started."""
        self._remember_families()
        own = [process for process in self._processes.values() if process.poll() is None]
        for process in reversed(own):
            process.terminate()
        _, alive = psutil.wait_procs(self._family, timeout=_END_SECONDS)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(alive, timeout=_END_SECONDS)
        for process in own:
            process.wait()
        self._processes.clear()
        (self._folder / "pids.json").unlink(missing_ok=True)

    def _start_workers(self) -> None:
        for node, site in self._sites.items():
            self._start(f"{node}.worker", self.worker(node, site))
        for node in self._sites:
            self.wait_for(f"{node}.worker")

    def _start_superlink(self) -> None:
        keys, home = self._keys, self._folder / "flower"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{self._port}"\nroot-certificates = "{keys.root}"\n'
        )
        words = [str(_BIN / "flower-superlink"), "--enable-supernode-auth"]
        words += ["--ssl-ca-certfile", str(keys.root), "--ssl-certfile", str(keys.certificate)]
        words += ["--ssl-keyfile", str(keys.key), "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--disable-runtime-dependency-installation"]
        # Registrations of nodes outlive the SuperLink here.
        words += ["--database", str(home / "state.db")]
        self._start("superlink", words)
        self.wait_for("superlink")

    def _start_supernodes(self) -> None:
        for node, site in self._sites.items():
            public = str(self._keys.public(node))
            register = ("supernode", "register", public, _CONNECTION, "--name", node)
            self._flwr(*register, "--format", "json")
            self._start(f"{node}.supernode", self.supernode(node, load_site(site).socket_path))

    def _start(self, name: str, words: list[str]) -> None:
        self._commands[name] = words
        with self._log(name).open("ab") as log:
            # In a session of its own: Ctrl-C reaches this process alone, which ends the others.
            self._processes[name] = subprocess.Popen(
                words,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        pids = {name: process.pid for name, process in self._processes.items()}
        (self._folder / "pids.json").write_text(json.dumps(pids, indent=2) + "\n")

    def _status(self, number: str, on_wait: Callable[[], None]) -> str:
        """The status of a run whose log has ended; the log is copied to ``run.log``."""
        follow = [str(_BIN / "flwr"), "log", number, _CONNECTION, "--stream"]
        with self._log("run").open("ab") as log:
            stream = subprocess.Popen(follow, env=self.variables, stdout=log, stderr=log)
        try:
            while stream.poll() is None:
                on_wait()
                self._check_alive()
                time.sleep(_POLL_SECONDS)
        finally:
            stream.kill()
            stream.wait()
        on_wait()
        found = self._flwr("list", _CONNECTION, "--run-id", number, "--format", "json")
        return str(found["runs"][0]["status"])

    def _flwr(self, *words: str) -> dict[str, Any]:
        """A command of ``flwr``, whose answer is JSON."""
        done = subprocess.run(
            [str(_BIN / "flwr"), *words], env=self.variables, capture_output=True, text=True
        )
        with contextlib.suppress(ValueError):
            found = json.loads(done.stdout)
            if isinstance(found, dict) and found.get("success"):
                return found
        what = done.stdout.strip() or done.stderr.strip()
        raise LaunchError(f"flwr {words[0]} failed: {what}; see {self._log('superlink')}")

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + _START_SECONDS
        while not is_there():
            self._check_alive()
            if time.monotonic() > until:
                raise LaunchError(f"{what} took too long; see {self._folder}")
            time.sleep(_POLL_SECONDS)

    def _remember_families(self) -> None:
        """Note who descends from the started processes; a child may outlive its parent."""
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                one = psutil.Process(process.pid)
                self._family |= {one, *one.children(recursive=True)}

    def _check_alive(self) -> None:
        self._remember_families()
        for name, process in self._processes.items():
            if name not in self._may_end and process.poll() is not None:
                raise LaunchError(f"{name} has ended; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _answers(client: NodeClient) -> bool:
    with contextlib.suppress(NodeError):
        client.call("about")
        return True
    return False


def _is_server_app(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        is_alive = process.status() != psutil.STATUS_ZOMBIE
        return is_alive and any("flwr-serverapp" in word for word in process.cmdline())
    return False


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
