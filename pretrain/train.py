"""The training loop: through the stages, with exact resume.

videoar pretrain --config pretrain/configs/demo/pretrain.yaml                                         one process
python -m torch.distributed.run --nproc-per-node 2 -m videoar pretrain --config FILE                  tensor parallel 2
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from parallel.checkpoint import latest
from parallel.setup import ProcessInfo, destroy, initialize
from pretrain.config import PretrainConfig
from pretrain.sample_log import SampleLog
from pretrain.stages import make_plan
from pretrain.start import Position, exported_weights
from pretrain.trainer import Trainer
from pretrain.watchdog import watch
from pretrain.watching.ledger import Ledger
from pretrain.watching.watcher import Watcher
from tokenizer.errors import UserError
from tokenizer.stop import stop_on_signals


def main_entry(config: PretrainConfig) -> bool:
    """`videoar pretrain`: `pretrain`, then the process groups are left. Returns whether all stages are done, or `last_stage`."""
    try:
        return pretrain(config).stage >= config.stages_to_go
    finally:
        destroy()


def pretrain(config: PretrainConfig) -> Position:
    """Trains through all stages; called again with the same output folder, it goes on from the newest sound checkpoint.

    Every process of a run calls it with the same settings. On SIGTERM or SIGUSR1 the step under way is finished and saved, and the
    function returns.

    Returns:
        How far the run is: `stage` is the number of stages where all of them are done.

    Raises:
        UserError: settings, codes, layout or checkpoint do not fit together, or the loss is not finite.
    """
    ledger = Ledger()
    config = config.rooted()
    config.samples.check_files()
    with stop_on_signals() as stop, ExitStack() as stack:
        plan = make_plan(config)
        info = initialize(config.parallel, config.seed)
        check_batches(config, info)
        out = Path(config.out)
        if config.from_export is not None and latest(out / "checkpoints") is None:
            exported_weights(config.from_export, plan)  # is refused before there is anything in `out`
        watchdog = stack.enter_context(watch(config.resilience, out, info))
        trainer = Trainer(config, plan, info, stop, watchdog, ledger)
        position = trainer.restore()
        if info.rank == 0:
            try:
                trainer.watch_with(Watcher(config, plan, info, position.global_step, ledger))
            except OSError as error:
                raise UserError(
                    f"the run's files can't be written to {out} ({error}): make room or name another `out`."
                ) from error
        if config.log_samples and info.first_of_its_clips:
            rank, size = info.data_parallel_rank, info.data_parallel_size
            trainer.samples = SampleLog(out, rank, size, position.global_step)
        try:
            while position.stage < config.stages_to_go:
                position = trainer.run_stage(plan.stages[position.stage], position)
                if stop.stopping:
                    break
            trainer.saver.wait()
            finished = position.stage >= config.stages_to_go
            if finished:
                trainer.wait_for_samples(position.global_step)
            if trainer.watcher is not None:
                trainer.watcher.ended(finished, position.global_step)
        except UserError as error:
            if trainer.watcher is not None:
                trainer.watcher.failed(str(error))
            raise
        finally:
            if trainer.watcher is not None:
                trainer.watcher.close()
            if trainer.samples is not None:
                trainer.samples.close()
    return position


def check_batches(config: PretrainConfig, info: ProcessInfo) -> None:
    """Raises UserError, with a size that works, if a global batch does not divide into microbatches on all ranks."""
    for stage in config.stages:
        multiple = config.parallel.microbatch_multiple
        share = stage.micro_batch_size * info.data_parallel_size * multiple
        if stage.global_batch_size % share:
            stages = f" x {multiple} interleaved pipeline stages" if multiple > 1 else ""
            raise UserError(
                f"stage '{stage.name}': global_batch_size {stage.global_batch_size} is no multiple of micro_batch_size "
                f"{stage.micro_batch_size} x {info.data_parallel_size} data-parallel ranks{stages}: choose a multiple of {share}."
            )
