"""torch's 1F1B schedule with every receive posted when a step begins: what comes while a rank computes is there then.

torch's own waits for each transfer before it computes, and gloo moves nothing until the receive is posted. Buffers for
all micro batches are there in any case. Over NCCL a receive that waits would hold up what is sent to the same rank, so
there torch's own is taken (benchmarks/split_layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.pipelining.schedules import _batch_p2p, _wait_batch_p2p


class EarlyReceives(Schedule1F1B):
    """1F1B that waits for what it needs next, and for nothing that it has sent before the step's end."""

    def _step_microbatches(self, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, losses: Any = None,
                           return_outputs: bool = True, loss_kwargs: Any = None) -> None:
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        self._initialize_stage(arg_mbs[0], kwarg_mbs[0], target_mbs[0] if target_mbs else None, loss_kwargs)
        stage, count = self._stage, self._n_microbatches
        hidden = [_batch_p2p(stage.get_fwd_recv_ops(number)) for number in range(count)]
        gradients = [_batch_p2p(stage.get_bwd_recv_ops(number)) for number in range(count)]
        sent: list[Any] = []
        for number, is_forward in self._order():
            if is_forward:
                _wait_batch_p2p(hidden[number])
                output = stage.forward_one_chunk(number, arg_mbs[number], kwarg_mbs[number],
                                                 save_forward_output=return_outputs)
                sent += _batch_p2p(stage.get_fwd_send_ops(number))
                self._maybe_compute_loss(stage, output, target_mbs, number, loss_kwargs)
            else:
                _wait_batch_p2p(gradients[number])
                stage.backward_one_chunk(number, loss=self._maybe_get_loss(stage, number),
                                         last_backward=number == count - 1)
                sent += _batch_p2p(stage.get_bwd_send_ops(number))
        _wait_batch_p2p(sent)
        self._update_losses(stage, losses)
        stage.perform_reduce_grad(count if self.scale_grads else 1)

    def _order(self) -> Iterator[tuple[int, bool]]:
        """Yield micro batches in 1F1B's order, each with whether it goes forward; one more is under way than there."""
        behind = self._num_stages - 1 - self._stage.stage_index
        count, ahead = self._n_microbatches, behind + 1 + min(behind, 1)
        for number in range(count):
            if number >= ahead:
                yield number - ahead, False
            yield number, True
        for number in range(max(0, count - ahead), count):
            yield number, False


def schedule_class() -> type[Schedule1F1B]:
    """Return the schedule for the process group's backend."""
    return EarlyReceives if dist.get_backend() == "gloo" else Schedule1F1B
