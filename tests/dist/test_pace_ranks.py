"""A straggler is reported by rank, for a slow forward pass and for slow data."""

import time

from trainer.config.schema import Parallel

SLOW_S = 0.05


def train(world, folder, slow_rank, slow_part, strategy):
    """Train 30 steps with one slow rank; return the messages and the ranks' peak memory."""
    import torch
    from support.loop_jobs import DATA, Lines, Net
    from support.savers import a_saver_for

    from trainer.checkpoint import lineage
    from trainer.cluster.stop import Stop
    from trainer.core.intervals import Every
    from trainer.core.state import State
    from trainer.data.source import TrainStream
    from trainer.storage import open_store
    from trainer.task import Classification
    from trainer.training import loop, parallel
    from trainer.training.job import Job, Phase

    is_slow = world.rank == slow_rank

    class Sleepy(Classification):
        def loss(self, model, batch):
            if is_slow and slow_part == "forward":
                time.sleep(SLOW_S)
            return super().loss(model, batch)

    class SleepyData:
        def __len__(self):
            return len(DATA.train)

        def __getitems__(self, indices):
            if is_slow and slow_part == "data":
                time.sleep(SLOW_S)
            inputs, labels = DATA.train.tensors
            return inputs[indices], labels[indices]

    class MessageLog(Lines):
        def __init__(self):
            super().__init__()
            self.messages = []

        def message(self, text):
            self.messages.append(text)

    torch.manual_seed(0)
    model = Net()
    options = Parallel() if strategy == "ddp" else Parallel(strategy="fsdp")
    wrapped = parallel.wrap(model, world, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = MessageLog()
    job = Job(
        world=world, model=model, task=Sleepy(), tracker=tracker, max_steps=30,
        phases=[Phase(wrapped=wrapped, optimizer=optimizer)],
        data=TrainStream(SleepyData(), world, 5, 6), eval_every=Every(), log_every_steps=10,
    )  # fmt: skip
    store = open_store(folder)
    attempt = world.run_on_rank0(lambda: lineage.begin(store, {}))
    world.run_on_rank0(lambda: lineage.amend(store, attempt, {"resumed_from": {"step": 0}}))
    saver, state, stop = a_saver_for(store, attempt, world), State(), Stop(world)
    timing = loop.start_timing(job, state, saver, stop)
    loop.train(job, state, saver, stop, timing=timing)
    return tracker.messages, timing.totals().peak_bytes


CASES = [(1, "forward", "ddp"), (0, "data", "ddp"), (1, "forward", "fsdp")]


def all_cases(world, folder):
    return [train(world, f"{folder}/{index}", *case) for index, case in enumerate(CASES)]


def test_straggler_message_names_slow_rank_once(on_ranks, tmp_path):
    for answers in on_ranks(2, all_cases, str(tmp_path)):
        for (slow_rank, slow_part, _), (messages, peaks) in zip(CASES, answers, strict=True):
            (text,) = messages  # on every rank; only rank 0 has a real tracker
            assert text.startswith(f"straggler: rank {slow_rank} (")
            data_s = float(text.partition("its data: ")[2].split()[0])
            forward_s = float(text.partition("its forward: ")[2].split()[0])
            assert (data_s if slow_part == "data" else forward_s) >= SLOW_S
            assert len(peaks) == 2
            assert min(peaks) > 10_000_000
