"""Running one batch through the stages, in the order of one of torch's schedules."""

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_ext.mesh import ProcessGrid
from megatron_ext.pipeline.forward_only import forward_only
from megatron_ext.pipeline.layout import StageLayout
from megatron_ext.pipeline.stage import Stage
from megatron_ext.torch_private import PipelineSchedule
from megatron_ext.zero import DataParallelStage

Batch = dict[str, torch.Tensor]


class Pipeline:
    """All microbatches of one optimizer step, forward and backward, over this rank's stages.

    stages: global stage index -> data-parallel decoder, for the stages of this rank. Loss and gradients end up as the
    mean over the tokens of the global batch: of a batch with "loss_mask" [.., s], the mean weighted by it. So they
    do not depend on how the batch is cut into ranks and microbatches, nor on where in it the masked tokens are.
    """

    def __init__(
        self,
        layout: StageLayout,
        stages: Mapping[int, DataParallelStage],
        grid: ProcessGrid,
        n_microbatches: int,
        micro_batch_size: int,
        seq_length: int,
    ):
        self.layout, self.stages, self.grid = layout, stages, grid
        self.n_microbatches = n_microbatches
        self._micro_batch_size, self._seq_length = micro_batch_size, seq_length
        self.holds_first = 0 in stages
        self.holds_last = len(layout.stages) - 1 in stages
        self._loss_scale: torch.Tensor | float = 1.0
        self._losses: list[torch.Tensor] = []
        _meet_neighbours(layout, grid)
        self._schedule = None if layout.schedule == "none" else self._build()

    def _build(self) -> PipelineSchedule:
        stages = [self._stage(i, data_parallel) for i, data_parallel in self.stages.items()]
        return self.layout.order.runs(
            stages[0] if self.layout.order.one_stage else stages,
            n_microbatches=self.n_microbatches,
            loss_fn=self._scaled_loss,
            scale_grads=False,
        )

    def _scaled_loss(self, loss: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        """The last stage computes its own loss, so that the schedule never holds on to logits; scale and note it."""
        self._losses.append(loss.detach())
        return loss * self._loss_scale

    def _hidden(self, device: torch.device | str) -> torch.Tensor:
        """Uninitialised room for what one stage hands to the next for a microbatch."""
        decoder = next(iter(self.stages.values())).decoder
        length = self._seq_length // (decoder.tp.size if decoder.tp.sequence_parallel else 1)
        return torch.empty(
            self._micro_batch_size, length, decoder.config.hidden_size, dtype=decoder.dtype, device=device
        )

    def _stage(self, index: int, data_parallel: DataParallelStage) -> Stage:
        decoder = data_parallel.decoder
        ids = torch.empty(self._micro_batch_size, self._seq_length, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.promote_types(decoder.dtype, torch.float32), device="meta")
        return Stage(
            data_parallel=data_parallel,
            room=self._hidden,
            stage_index=index,
            num_stages=len(self.layout.stages),
            device=self.grid.device,
            input_args=ids if decoder.stage.has_embedding else self._hidden("meta").requires_grad_(),
            output_args=(loss if decoder.stage.has_head else self._hidden("meta")).requires_grad_(),
            group=self.grid.mesh["pp"].get_group(),
        )

    def forward_backward(self, batch: Batch, loss_scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Run the batch ([microbatches x micro batch size, s] tensors on the device); gradients accumulate in .grad.

        Returns this rank's share of the mean loss (float64 scalar): the world's shares add up to it.
        """
        for data_parallel in self.stages.values():
            data_parallel.begin()
        share = self._share_of_a_token(batch) if self.holds_last else 0.0
        averaged_over = next(iter(self.stages.values())).averaged_over
        self._loss_scale = share * (loss_scale * averaged_over)
        if self._schedule is None:
            self._one_stage(batch)
        else:
            self._run(self._schedule, batch)
        return self._sum_losses() * share

    def _share_of_a_token(self, batch: Batch) -> torch.Tensor | float:
        """One over the tokens of the global batch, over the sum of their weights where there is a mask.

        The last stage's ranks ask for it together, before the first microbatch: with a mask it takes a message. Of a
        batch that is masked whole it is 0, and so are loss and gradient.
        """
        mask = batch.get("loss_mask")
        if mask is None:
            return 1 / (batch["labels"].numel() * self.grid.dp_size)
        tokens = mask.sum(dtype=torch.float64)
        for axis in ("dp_shard", "dp_replicate"):
            if self.grid.size(axis) > 1:
                dist.all_reduce(tokens, group=self.grid.mesh[axis].get_group())
        return torch.where(tokens == 0, 0.0, 1 / tokens)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Run the batch without gradients.

        Returns this rank's shares, float64 [2], of the batch's summed loss and of the tokens that it is summed over.
        """
        modules = {index: stage.module for index, stage in self.stages.items()}
        for data_parallel in self.stages.values():
            data_parallel.begin()
            data_parallel.module.eval()
        self._losses += forward_only(modules, self.layout, self._split(batch), self.grid, self._hidden)
        for data_parallel in self.stages.values():
            data_parallel.module.train()
            data_parallel.reshard()
        loss, tokens = self._sum_losses(), torch.zeros((), dtype=torch.float64, device=self.grid.device)
        if self.holds_last:
            mask = batch.get("loss_mask")
            tokens += batch["labels"].numel() if mask is None else mask.sum(dtype=torch.float64)
        return torch.stack([loss, tokens / self.grid.size("tp")])

    def _one_stage(self, batch: Batch) -> None:
        data_parallel = self.stages[0]
        for i, part in enumerate(self._split(batch)):
            last = i == self.n_microbatches - 1
            loss = data_parallel.module(part.pop("tokens"), **part)
            self._losses.append(loss.detach())
            data_parallel.backward(loss * self._loss_scale, None, last)

    def _run(self, schedule: PipelineSchedule, batch: Batch) -> None:
        batch = dict(batch)
        tokens, labels = batch.pop("tokens"), batch["labels"]
        if not self.holds_last:
            del batch["labels"]
            batch.pop("loss_mask", None)
        schedule.step(
            *([tokens] if self.holds_first else []),
            target=labels if self.holds_last else None,
            return_outputs=False,
            **batch,  # type: ignore[arg-type]  # of which step's own options are not
        )

    def _split(self, batch: Batch) -> list[Batch]:
        parts = {name: tensor.chunk(self.n_microbatches) for name, tensor in batch.items()}
        return [{name: chunks[i] for name, chunks in parts.items()} for i in range(self.n_microbatches)]

    def _sum_losses(self) -> torch.Tensor:
        """This rank's share of the microbatches' losses, which all of its tensor-parallel group have: their sum."""
        losses, self._losses = self._losses, []
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.grid.device)
        return torch.cat(losses).double().sum() / self.grid.size("tp")


def _meet_neighbours(layout: StageLayout, grid: ProcessGrid) -> None:
    """Make the communicators of ranks with neighbouring stages, pair after pair in the order of the stages.

    NCCL makes one at the first message between the two, where both wait for each other: ranks that began with different
    neighbours could do so in a circle.
    """
    group, me = grid.mesh["pp"].get_group(), grid.rank("pp")
    pairs = (tuple(sorted(pair)) for pair in itertools.pairwise(layout.rank_of))
    for sender, receiver in dict.fromkeys(pairs):
        greeting = torch.zeros(1, device=grid.device)
        if me == sender != receiver:
            dist.send(greeting, group=group, group_dst=receiver)
        elif me == receiver != sender:
            dist.recv(greeting, group=group, group_src=sender)
