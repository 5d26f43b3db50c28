"""A run as a Slurm job: the batch script written and handed in by submitit, one task a rank, requeued when it is pre-empted.

A task starts `fullrank` with the variables of a rank and waits for it. When Slurm tells the job that it will be pre-empted, or
that its time is up, the first task asks its rank to stop, which all ranks then do after their step, with the state saved; the job
is then put back into the queue, where the same command continues. submitit keeps scripts, logs and its own pickle of the command
in `runs/<name>/slurm`, which must be on a disk that the nodes share, as runs must.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.errors import UsageError, missing_extra

#: Exit code of a run that was stopped with its state saved (`fullrank.errors.Stopped`).
_STOPPED = 75
#: Timeouts after which a job is still put back: a long training takes as many sittings as it takes.
_MOST_TIMEOUTS = 1000


@dataclass
class Task:
    """What each task of the job does; submitit calls it, and `checkpoint` in the first one when the job is to end."""

    arguments: list[str]
    """Of `fullrank`."""
    stopping_seconds: float
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Runs as one rank.

        Raises:
            RuntimeError: it failed; what it said is in the task's log.
        """
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        self.process = subprocess.Popen([sys.executable, "-m", "fullrank", *self.arguments])
        code = self.process.wait()
        if code not in (0, _STOPPED):
            raise RuntimeError(f"fullrank ended with {code}; what it said is above")
        return code

    def checkpoint(self) -> Any:
        """Has the run stop with its state saved; the same task is then submitted again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=self.stopping_seconds)
            except subprocess.TimeoutExpired:  # the last checkpoint counts
                self.process.kill()
        return DelayedSubmission(Task(self.arguments, self.stopping_seconds))

    __submitit_checkpoint__ = checkpoint


def submit(
    arguments: Sequence[str],
    folder: Path,
    *,
    name: str,
    nodes: int,
    ranks_per_node: int,
    gpus: bool,
    minutes: int,
    stopping_seconds: int,
    options: Mapping[str, str],
) -> tuple[str, Path]:
    """Writes the script and hands it in.

    Args:
        arguments: of `fullrank` in each task.
        folder: for scripts and logs, shared by the nodes.
        name: of the job.
        nodes: machines.
        ranks_per_node: tasks on each of them, one a device.
        gpus: whether a rank's device is a GPU.
        minutes: time limit of one sitting.
        stopping_seconds: before the limit, when the job is told; it stops and saves within them.
        options: more of sbatch's, by their long names without dashes.

    Returns:
        The job's number and the script.

    Raises:
        UsageError: there is no Slurm here, or it refuses the job.
    """
    try:
        import submitit
    except ImportError:
        raise missing_extra("submitit", "slurm", "handing in a Slurm job") from None
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=_MOST_TIMEOUTS)
    except RuntimeError as error:
        raise UsageError(f"Slurm is not here: {error}", hint="type this on a login node of the cluster") from None
    asked: dict[str, Any] = {
        "name": name,
        "nodes": nodes,
        "tasks_per_node": ranks_per_node,
        "timeout_min": minutes,
        "slurm_signal_delay_s": stopping_seconds,
        "slurm_additional_parameters": dict(options),
    }
    if gpus:
        asked["slurm_gpus_per_node"] = ranks_per_node
    executor.update_parameters(**asked)
    try:
        job = executor.submit(Task(list(arguments), 0.8 * stopping_seconds))
    except submitit.core.utils.FailedJobError as error:
        raise UsageError(f"sbatch refused the job: {error}", hint="its options are those after --option") from None
    return job.job_id, Path(job.paths.submission_file)
