"""A bound on the length of sampled answers, measured at every evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_examples, make_rows
from nonfinite import MARK, break_token, marked
from peft import LoraConfig
from plain_executor import PlainExecutor

from evollm import Callback, ConfigurationError, PreferenceGym, SFTGym, finetune_llm_preference, finetune_llm_sft
from evollm.execution import answer_lengths
from evollm.execution.local import LocalExecutor
from evollm.hpo import AnswerSampling
from evollm.runs.evaluations import read_evaluations

GUARDS = {"max_answer_length_ratio": 1.5, "answer_prompts": 3, "answer_tokens": 20}


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 3:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    def start(name: str, *, resume: bool = False, **changes) -> tuple[list, list[float]]:
        env = PreferenceGym(make_rows(12), make_rows(5, 50), tokenizer, data_batch_size_per_gpu=4)
        population = make_population(3)
        for agent, lr in zip(population, (1e-3, 5e-3, 2e-2), strict=True):
            agent.lr = lr
        where = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        settings = {"max_steps": 4, "evaluation_interval": 2, "checkpoint_steps": 1, "guards": GUARDS, **changes}
        return finetune_llm_preference(population, env, verbose=False, num_sample_answers=0, **settings, **where)

    return start


def test_an_agent_with_answers_that_are_too_long_is_behind(run, tmp_path, monkeypatch) -> None:
    asked = []

    def lengths(base, adapters, prompts, tokenizer, max_new_tokens):
        asked.append(adapters)
        # The actors in their order, and the reference by itself.
        lengths = [2, 8, 6] if len(adapters) == 3 else [4]
        return [[length] * len(prompts) for length in lengths]

    monkeypatch.setattr(answer_lengths, "greedy_lengths", lengths)
    _, fitnesses = run("run")
    assert [fitness == -1e9 for fitness in fitnesses] == [False, True, False]
    # The reference once in the run, each agent at both evaluations.
    assert [len(adapters) for adapters in asked] == [3, 1, 3]
    assert asked[0] == asked[2]
    found = read_evaluations(tmp_path / "run/evaluations/step-000004.safetensors")
    assert found["agent-1"].answer_lengths.tolist()[:3] == [8, 8, 8]
    assert np.isnan(found["agent-1"].answer_lengths[3:]).all()
    assert [found[f"agent-{index}"].answer_length_ratio for index in range(3)] == [0.5, 2.0, 1.5]


@pytest.mark.filterwarnings("ignore:.*cannot be broken")
@pytest.mark.parametrize(("rows", "prompts"), [(3, 2), (3, 3), (4, 16), (5, 3)])
def test_lengths_stand_at_the_rows_of_their_prompts_also_where_few_are_evaluated(
    make_population, tokenizer, monkeypatch, rows, prompts
) -> None:
    env = PreferenceGym(make_rows(12), make_rows(6, 50), tokenizer, data_batch_size_per_gpu=4)
    asked = []

    def lengths(base, adapters, prompts, tokenizer, max_new_tokens):
        asked.append((len(adapters), len(prompts)))
        return [[int(sum(prompt)) for prompt in prompts]] * len(adapters)

    monkeypatch.setattr(answer_lengths, "greedy_lengths", lengths)
    executor = LocalExecutor(make_population(2), env)
    for _ in range(2):
        found = executor.evaluate("test", answers=AnswerSampling(prompts, 9), rows=rows)
    positions = sorted(int(position) for batch, _ in env.eval_batches("test", rows=rows) for position in batch)
    wanted = [int(sum(env.test_pairs[position].prompt_ids)) for position in positions[:prompts]]
    assert len(set(wanted)) == len(wanted)
    for one in found.values():
        assert one.answer_lengths[:prompts].tolist() == one.reference_lengths[:prompts].tolist() == wanted
        assert np.isnan(one.answer_lengths[prompts:]).all()
        assert len(one.answer_lengths) == len(one) == rows
    # The reference answers a prompt once in the run, also where a later evaluation has more of them.
    executor.evaluate("test", answers=AnswerSampling(prompts, 9))
    assert sum(count for adapters, count in asked if adapters == 1) == len(
        {*positions[:prompts], *range(min(prompts, 6))}
    )


@pytest.mark.filterwarnings("ignore:left out")
def test_no_prompt_of_a_row_that_is_left_out_is_answered(make_model, make_population, tokenizer, monkeypatch) -> None:
    model = break_token(make_model(), tokenizer)
    env = PreferenceGym(make_rows(12), marked(make_rows(6, 50), {1: "chosen"}), tokenizer, data_batch_size_per_gpu=4)
    monkeypatch.setattr(
        answer_lengths,
        "greedy_lengths",
        lambda base, adapters, prompts, *_: [[len(one) for one in prompts]] * len(adapters),
    )
    executor = LocalExecutor(make_population(2, actor_network=model), env)
    for prompts in (3, 16):
        found = executor.evaluate("test", answers=AnswerSampling(prompts, 9))[0]
        wanted = [len(env.test_pairs[position].prompt_ids) for position in (0, 2, 3, 4, 5)][:prompts]
        assert found.answer_lengths[:prompts].tolist() == found.reference_lengths[:prompts].tolist() == wanted
        assert len(found) == 5


@pytest.mark.filterwarnings("ignore:left out", "ignore:.*members go one by one")
def test_lengths_stand_at_their_rows_where_another_agents_reference_had_left_one_out(
    make_model, make_agent, tokenizer, monkeypatch
) -> None:
    """Agents that are scored together have the same rows; those that are scored later have their own."""
    model = make_model()
    env = PreferenceGym(make_rows(12), marked(make_rows(6, 50), {1: "chosen"}), tokenizer, data_batch_size_per_gpu=4)
    lora = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    agents = [make_agent(actor_network=model, index=0), make_agent(actor_network=model, index=1, lora_config=lora)]
    state = agents[1].base.adapters.export(agents[1].adapter("reference"))
    (token,) = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    for name, tensor in state.tensors.items():
        if "lora_embedding_A" in name:
            tensor[:, token] = torch.nan
    agents[1]._replace_reference(state)
    monkeypatch.setattr(
        answer_lengths,
        "greedy_lengths",
        lambda base, adapters, prompts, *_: [[int(sum(one)) for one in prompts]] * len(adapters),
    )
    executor = LocalExecutor(agents, env)
    sums = [int(sum(pair.prompt_ids)) for pair in env.test_pairs]
    for indices, positions in (([0, 1], (0, 2, 3, 4, 5)), ([0], range(6)), ([1], (0, 2, 3, 4, 5)), ([0], range(6))):
        for one in executor.evaluate("test", indices, answers=AnswerSampling(3, 9)).values():
            assert len(one) == len(positions)
            assert one.answer_lengths[:3].tolist() == [sums[position] for position in positions][:3]


def test_lengths_are_those_of_the_answers_that_generate_gives(make_population, gym, tokenizer) -> None:
    agents = make_population(2)
    agents[0].lr = 3e-2
    for _ in range(4):
        agents[0].learn(gym.next_batch())
    # A model with random weights would never end an answer.
    ends = [tokenizer.eos_token_id, *range(0, len(tokenizer), 6)]
    agents[0].base.network.generation_config.eos_token_id = ends
    executor = LocalExecutor(agents, gym)
    found = executor.evaluate("test", answers=AnswerSampling(4, 9))
    for agent in agents:
        lengths = []
        for pair in gym.test_pairs[:4]:
            prompt = torch.from_numpy(pair.prompt_ids)[None]
            with agent.base.active(agent.actor_adapter) as network:
                answer = network.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=9,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.eos_token_id,
                )
            lengths.append(len(answer[0]) - len(pair.prompt_ids))
        assert found[agent.index].answer_lengths[:4].tolist() == lengths
    assert found[0].answer_lengths[:4].tolist() != found[0].reference_lengths[:4].tolist()
    # The second agent has learnt nothing, so its answers are the reference's.
    assert found[1].answer_length_ratio == 1.0
    # What else an evaluation has does not depend on the answers.
    plain = executor.evaluate("test")
    assert all((plain[index].margins == found[index].margins).all() for index in plain)
    assert plain[0].answer_lengths is None


@pytest.mark.filterwarnings("ignore:.*cannot be broken")
def test_a_run_with_the_bound_goes_on_bit_for_bit(run, tmp_path) -> None:
    run("whole")
    with pytest.raises(RuntimeError):
        run("killed", callbacks=[Crash()])
    run("killed", resume=True)
    for name in ("metrics.jsonl", "evaluations/step-000004.safetensors"):
        whole, killed = (Path(tmp_path, folder, name).read_bytes() for folder in ("whole", "killed"))
        assert whole == killed


def test_a_bound_that_cut_answers_cannot_break_is_warned_of(run) -> None:
    with pytest.warns(UserWarning, match=r"cannot be broken: .* cut at guards\.answer_tokens=1; raise that"):
        run("run", guards={**GUARDS, "answer_tokens": 1})


def test_where_answers_cannot_be_sampled_the_bound_is_refused(run, make_sft_population, tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"guards\.max_answer_length_ratio=1\.5: needs an argument answers"):
        run("refused", executor=PlainExecutor)
    env = SFTGym(make_examples(8), make_examples(4, 8), tokenizer, data_batch_size_per_gpu=4)
    with pytest.raises(TypeError, match="guards"):
        finetune_llm_sft(make_sft_population(2), env, guards=GUARDS, run_dir=tmp_path / "sft")
