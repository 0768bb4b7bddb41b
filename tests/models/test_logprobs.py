from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from evollm import CheckpointError
from evollm.data.samples import Batch, Sample
from evollm.models import ReferenceCache, completion_logprobs
from evollm.models.logprobs import CompletionSums, TokenLogprobs, pieces_of

CPU = torch.device("cpu")


def by_hand(network: nn.Module, prompt: np.ndarray, completion: np.ndarray) -> float:
    """One sequence by itself: log_softmax over the full logits, summed over the completion's tokens."""
    ids = torch.from_numpy(np.concatenate([prompt, completion])).unsqueeze(0)
    with torch.no_grad():
        logprobs = network(ids).logits.double().log_softmax(dim=-1)[0]
    positions = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(logprobs[position, ids[0, position + 1]].item() for position in positions)


@pytest.fixture
def network(make_model) -> nn.Module:
    return make_model(dtype=torch.float64).eval()


class PlainSignature(nn.Module):
    """A model that gives all logits or none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids, attention_mask, use_cache):
        return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("explicit_positions", [True, False])
def test_log_probs_equal_those_of_each_sequence_by_itself(network, gym, explicit_positions: bool) -> None:
    batch = gym.next_batch()
    with torch.no_grad():
        found = completion_logprobs(network, batch, CPU, explicit_positions=explicit_positions)
    for row in range(len(batch)):
        pair = batch[row]
        assert found.chosen[row].item() == pytest.approx(by_hand(network, pair.prompt_ids, pair.chosen_ids), abs=1e-10)
        rejected = by_hand(network, pair.prompt_ids, pair.rejected_ids)
        assert found.rejected[row].item() == pytest.approx(rejected, abs=1e-10)


def test_a_model_that_cannot_leave_logits_out_gives_the_same(network, gym) -> None:
    batch = gym.next_batch()
    with torch.no_grad():
        expected = completion_logprobs(network, batch, CPU)
        found = completion_logprobs(PlainSignature(network), batch, CPU)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.rejected, expected.rejected, rtol=0, atol=1e-10)


def test_a_pair_has_the_same_log_probs_in_any_batch(network, gym) -> None:
    batch = gym.next_batch()
    with torch.no_grad():
        together = completion_logprobs(network, batch, CPU).rejected
        apart = torch.cat([completion_logprobs(network, part, CPU).rejected for part in batch.split(1)])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-10)


class CountedRows(PlainSignature):
    """Notes how many sequences went through the model."""

    def forward(self, input_ids, attention_mask, use_cache):
        self.rows = len(input_ids)
        return super().forward(input_ids, attention_mask, use_cache)


@pytest.mark.parametrize("tiled_head", [False, True])
def test_an_empty_rejected_side_has_log_prob_0_and_costs_no_sequence(network, gym, tiled_head: bool) -> None:
    """Of four pairs the first and the last keep their rejected sides."""
    batch = gym.next_batch()
    pairs = [batch[row] for row in range(4)]
    mixed = [Sample.of(p.prompt_ids, p.chosen_ids) if row in (1, 2) else p for row, p in enumerate(pairs)]
    with torch.no_grad():
        expected = completion_logprobs(network, batch, CPU)
        found = completion_logprobs(network, Batch(mixed), CPU, tiled_head=tiled_head)
        counted = CountedRows(network)
        completion_logprobs(counted, Batch(mixed), CPU)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.rejected[[0, 3]], expected.rejected[[0, 3]], rtol=0, atol=1e-10)
    assert found.rejected[[1, 2]].tolist() == [0.0, 0.0]
    assert counted.rows == 6


def test_sums_of_a_bfloat16_model_are_finer_than_bfloat16(make_model, gym) -> None:
    batch = gym.next_batch()
    with torch.no_grad():
        sums = completion_logprobs(make_model(dtype=torch.bfloat16).eval(), batch, CPU).rejected
    assert sums.dtype == torch.float32
    assert not torch.equal(sums, sums.bfloat16().float())


def test_a_reference_is_computed_once_for_each_pair(gym) -> None:
    cache, asked = ReferenceCache(), []

    def compute(batch: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        asked.append((len(batch), list(numbers)))
        lengths = -torch.tensor(batch.chosen_lengths).float(), -torch.tensor(batch.rejected_lengths).float()
        return [CompletionSums(lengths)] * len(numbers)

    first, second = gym.next_batch(), gym.next_batch()
    mixed = Batch([first[1], second[0]])
    cache.get(["a"], first, compute)
    (found,) = cache.get(["a"], mixed, compute)
    assert asked == [(4, [0]), (1, [0])]
    assert found.chosen.tolist() == [-first.chosen_lengths[1], -second.chosen_lengths[0]]
    cache.get(["a", "b", "c"], first, compute)
    assert asked[2:] == [(4, [1, 2])]
    assert len(cache) == 13
    cache.forget("a")
    assert len(cache) == 8


def test_expected_samples_are_computed_with_a_batch_that_lacks_any(gym) -> None:
    cache, asked = ReferenceCache(), []

    def compute(batch: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        asked.append(len(batch))
        lengths = -torch.tensor(batch.chosen_lengths).float(), -torch.tensor(batch.rejected_lengths).float()
        return [CompletionSums(lengths)] * len(numbers)

    first = gym.next_batch()
    second, third = Batch(gym.upcoming(4)), Batch(gym.upcoming(8)[4:])
    # The second batch is known, and does not have the third one computed for it.
    for batch, expected, computed in ((first, second, [8]), (second, third, []), (third, (), [4]), (first, third, [])):
        with cache.expecting([*expected]):
            (found,) = cache.get(["a"], batch, compute)
        assert found.chosen.tolist() == (-batch.chosen_lengths).tolist()
        assert [asked.pop() for _ in range(len(asked))] == computed
    cache.get(["b"], first, compute)
    assert asked == [4], "outside the block nothing is expected"


def test_reference_log_probs_kept_in_a_file_are_not_computed_again(gym, tmp_path) -> None:
    batch = gym.next_batch()

    def compute(missing: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        assert len(missing) == len(batch)
        return [CompletionSums((torch.rand(len(missing)) + n, torch.rand(len(missing)))) for n in numbers]

    def refuse(missing: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        raise AssertionError("known pairs were computed again")

    cache, again = ReferenceCache(), ReferenceCache()
    expected = cache.get(["a", "b"], batch, compute)
    cache.save(tmp_path / "kept.safetensors")
    again.load(tmp_path / "kept.safetensors")
    found = again.get(["b", "a"], batch, refuse)
    for one, other in zip(expected, reversed(found), strict=True):
        assert torch.equal(one.chosen, other.chosen)
        assert torch.equal(one.rejected, other.rejected)
    ReferenceCache().save(tmp_path / "empty.safetensors")
    again.load(tmp_path / "empty.safetensors")
    assert len(again) == 2 * len(batch)


def test_a_damaged_file_of_reference_log_probs_is_an_evollm_error(tmp_path) -> None:
    damaged = tmp_path / "kept.safetensors"
    damaged.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=str(damaged)):
        ReferenceCache().load(damaged)
    with pytest.raises(CheckpointError, match="missing"):
        ReferenceCache().load(tmp_path / "missing")


def test_keys_of_pairs_depend_on_where_the_prompt_ends() -> None:
    ids = np.arange(6)
    one = Batch([Sample.of(ids[:2], ids[2:4], ids[4:])])
    other = Batch([Sample.of(ids[:1], ids[1:4], ids[4:])])
    assert one.keys() != other.keys()


def test_sums_of_one_member_have_the_gradient_that_the_sums_of_all_have() -> None:
    """A function of the sums is called once for all members, and its gradients reach each member's tokens."""
    pairs = Batch([Sample.of(*(np.zeros(size, np.int64) for size in shape)) for shape in ((2, 4, 2), (2, 1, 3))])
    values = torch.arange(30, dtype=torch.float64).view(3, 10).requires_grad_()
    found, calls = TokenLogprobs(values, pieces_of(pairs)), []

    def doubled(sums: torch.Tensor) -> torch.Tensor:
        calls.append(sums.shape)
        return 2 * sums

    for member, one in enumerate(found.members):
        plain, changed = one.sums(up_to_shorter=True), one.sums(up_to_shorter=True, change=doubled)
        assert plain.chosen.tolist() == [values[member, :4].sum().item(), values[member, 4].item()]
        assert torch.equal(changed.chosen, 2 * plain.chosen)
        assert plain.up_to_shorter is not None
        assert changed.up_to_shorter is not None
        assert torch.equal(changed.up_to_shorter[1], 2 * plain.up_to_shorter[1])
    assert calls == [(3, 2)] * 4
    weighed = [(member + 1) * one.sums(change=doubled).rejected.sum() for member, one in enumerate(found.members)]
    torch.stack(weighed).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0] * 5 + [2.0 * (member + 1)] * 5 for member in range(3)]
