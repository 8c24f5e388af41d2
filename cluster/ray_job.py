"""Runs `videoar encode` as a job of a Ray cluster, so that it outlives the terminal it was started from.

    videoar encode --submit --ray-address http://head:8265 --shards /data/shards --tokenizer /data/tokenizer --out /data/codes

The driver runs on the cluster; this process only follows its log. `cluster/jobs/encode.yaml` describes the job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError

DESCRIPTION = Path(__file__).with_name("jobs") / "encode.yaml"
STOPPED = 3  # as of every command that stopped before its end and can go on
PATHS = ("shards", "cache", "tokenizer", "out")


@dataclass(frozen=True)
class RayJobConfig:
    """The description of a job.

    Args:
        python: absolute path of the interpreter on the cluster's nodes; None: this one's.
        project: absolute path of the checkout on the nodes, their PYTHONPATH; None: this one's.
        env_vars: environment of the driver and of its workers.
        entrypoint_num_cpus: CPUs that Ray keeps for the driver.
        entrypoint_resources: custom resources that Ray keeps for the driver.
        metadata: shown beside the job by the dashboard and `ray job list`.
    """

    python: str | None = None
    project: str | None = None
    env_vars: dict[str, str] = field(default_factory=dict)
    entrypoint_num_cpus: float = 0
    entrypoint_resources: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("python", "project"):
            _check_absolute(f"the job's {name}", getattr(self, name) or "/")
        if not self.entrypoint_num_cpus >= 0:
            raise UserError(f"entrypoint_num_cpus is {self.entrypoint_num_cpus}: it must be at least 0.")

    def request(self, encode: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of Ray's `JobSubmissionClient.submit_job`.

        Args:
            encode: all settings of `videoar encode` by name.

        Raises:
            UserError: a path is not absolute.
        """
        for name in PATHS:
            _check_absolute(f"--{name}", encode[name] or "/")
        kind, sign, folder = str(encode["text_encoder"]).partition(":")
        if sign:
            _check_absolute(f"the folder of --text_encoder {kind}:", folder)
        # Ray tells the driver by an environment variable which cluster it runs on, which "auto" reads
        settings = {name: value for name, value in {**encode, "ray_address": "auto"}.items() if value is not None}
        words = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
        ]
        project = self.project or str(Path(__file__).resolve().parents[1])
        variants = encode["variants"]
        return {
            "entrypoint": shlex.join([self.python or sys.executable, "-m", "videoar", "encode", *words]),
            "runtime_env": {"env_vars": {**self.env_vars, "PYTHONPATH": project}},
            "entrypoint_num_cpus": self.entrypoint_num_cpus,
            "entrypoint_resources": self.entrypoint_resources,
            "metadata": {
                "out": encode["out"],
                "variants": variants if isinstance(variants, str) else ",".join(variants),
                **self.metadata,
            },
        }


def submit_encode(encode: Mapping[str, Any], job: RayJobConfig, wait: bool = True) -> int:
    """Submits the job to the cluster at `encode["ray_address"]` and follows its log on standard output.

    Args:
        encode: all settings of `videoar encode` by name; the address is the dashboard's (http://head:8265), or "auto" on a node
            of the cluster.
        job: where and how the driver runs.
        wait: False: return once it is submitted, with its id on standard output.

    Returns:
        the driver's own exit status, above 128 by that much if a signal ended it; 3 if the job was stopped.

    Raises:
        UserError: a path is not absolute, no cluster answers, or the connection to a running job broke.
    """
    request, address = job.request(encode), encode["ray_address"]
    if not address:
        raise UserError("--submit needs the address of a Ray cluster: give --ray-address http://HEAD:8265.")
    client = _connect(address)
    try:
        name = client.submit_job(**request)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the Ray cluster at {address} does not take the job: {_short(error)}.") from error
    by = f"--address {client.get_address()} {name}"
    print(f"submitted; it goes on without this terminal; to stop it: ray job stop {by}", file=sys.stderr)
    if not wait:
        print(name)
        return 0
    try:
        asyncio.run(_follow(client, name))
        info = client.get_job_info(name)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the connection to the running job broke ({_short(error)}): see `ray job status {by}`, follow it by `ray job logs -f {by}`."
        ) from error
    except KeyboardInterrupt:
        print(f"\nthe job goes on; to follow it again: ray job logs -f {by}", file=sys.stderr)
        return 130
    if not info.status.is_terminal():
        raise UserError(f"the log of the running job ended early: follow it by `ray job logs -f {by}`.")
    status = _exit_status(info)
    print(f"job {name} {_ending(status, info.message)}", file=sys.stderr)
    return status


def _connect(address: str) -> Any:
    """A client of the cluster's job server."""
    _use_token()
    # or Ray would prefer a RAY_ADDRESS of the environment to what was typed
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    # importing the client sets its logger to tell every closed connection
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} refuses the token or misses one: put the token of its head (`ray get-auth-token` there) "
            "into ~/.ray/auth_token or the file that RAY_AUTH_TOKEN_PATH names."
        ) from error
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({_short(error)}): give the dashboard's address as http://HEAD:8265."
        ) from error


def _use_token() -> None:
    """Ray's client sends the token that is there only where RAY_AUTH_MODE says so before Ray is imported."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if named or Path.home().joinpath(".ray", "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


async def _follow(client: Any, name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(lines, end="", flush=True)


def _exit_status(info: Any) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED
    code = info.driver_exit_code or 1  # none if the driver's node died, or never had room for it
    return code if code > 0 else 128 - code


def _check_absolute(what: str, path: str) -> None:
    if not os.path.isabs(path) and "://" not in path:
        raise UserError(f"{what} is '{path}': give an absolute path, one that every node of the cluster sees.")


def _ending(status: int, message: str | None) -> str:
    if status == 0:
        return "succeeded"
    # the driver's last lines, which follow in Ray's message, have been printed
    reason = re.split(
        r",? (?:last available logs|Full traceback)", (message or "no reason is known").strip().splitlines()[0]
    )[0]
    again = "; the same command goes on from there" if status == STOPPED or status > 128 else ""
    return f"ended with status {status} ({reason.rstrip('.')}){again}"


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
    return (lines[-1].strip() if lines else type(error).__name__)[:300].rstrip(". ")
