from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from faults import broken, die
from tokenizers_for_tests import make_tokenizer

from evollm import DPO, CheckpointError, save_llm_checkpoint, save_merged_model, save_policy_archive
from evollm.checkpoints import newest_population, only_writer, prune_populations, read_population, replace_folder
from evollm.checkpoints.atomic import MANIFEST, existing_folder, seal, verify
from evollm.checkpoints.population import Population, write_population


@pytest.fixture
def population(make_population) -> list[DPO]:
    return make_population(2)


def save(population: list[DPO], path: Path, step: int) -> None:
    for agent in population:
        agent.steps = step
    cache = population[0].base.reference_cache
    state = {"step": step}
    write_population(path, Population([a.to_folder() for a in population], state, {}, None, cache), "base")


def step_of(path: Path) -> int:
    found = read_population(path)
    assert [agent.attributes["steps"] for agent in found.agents] == [found.state["step"]] * 2
    return found.state["step"]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def number_of_operations(population: list[DPO], path: Path) -> int:
    with broken(None) as count:
        save(population, path, 1)
    return count.calls


def test_whatever_operation_of_a_save_fails_the_reader_sees_the_old_or_the_new_checkpoint(population, tmp_path) -> None:
    path = tmp_path / "population"
    save(population, path, 1)
    total = number_of_operations(population, path)
    assert total > 20
    seen = []
    for number in range(total):
        save(population, path, 1)
        raised = False
        with broken(number):
            try:
                save(population, path, 2)
            except OSError as error:
                raised = "No space left" in str(error)
        seen.append((raised, step_of(existing_folder(path))))
        assert newest_population(tmp_path) == path
    # What fails once the new one is in its place costs nothing.
    assert set(seen) <= {(True, 1), (True, 2), (False, 2)}
    assert seen.count((True, 1)) > total // 2
    # And nothing is left that takes up room.
    save(population, path, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["population"]


def test_wherever_a_save_is_killed_the_reader_sees_the_old_or_the_new_checkpoint(population, tmp_path) -> None:
    path = tmp_path / "population"
    save(population, path, 1)
    total = number_of_operations(population, path)
    fork = multiprocessing.get_context("fork")
    seen = []
    for number in range(total):
        save(population, path, 1)
        process = fork.Process(target=_save_and_die, args=(population, path, number))
        process.start()
        process.join(60)
        assert process.exitcode == -9
        newest = newest_population(tmp_path)
        assert newest is not None
        seen.append(step_of(newest))
    assert set(seen) == {1, 2}
    save(population, path, 3)
    assert step_of(path) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["population"]


def _save_and_die(population: list[DPO], path: Path, number: int) -> None:
    with broken(number, how=die):
        save(population, path, 2)


def test_a_flipped_bit_a_cut_a_missing_and_a_swapped_file_are_named(population, tmp_path) -> None:
    path, other = tmp_path / "population", tmp_path / "other"
    save(population, path, 1)
    for agent in population:
        for parameter in agent.actor_parameters():
            parameter.data += 1
    save(population, other, 2)
    generator = torch.Generator().manual_seed(0)
    for file in files(path):
        name = file.relative_to(path).as_posix()
        whole = file.read_bytes()
        flipped = bytearray(whole)
        position = int(torch.randint(len(whole), (), generator=generator))
        flipped[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        swapped = (other / name).read_bytes()
        for damaged in (bytes(flipped), whole[: len(whole) // 2], None, swapped):
            if damaged == whole:
                continue
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            # Another's manifest is whole by itself; what it does not fit is named.
            with pytest.raises(CheckpointError, match="" if damaged == swapped else name):
                read_population(path)
            file.write_bytes(whole)
    assert step_of(path) == 1


def test_every_single_bit_of_a_manifest_counts(population, tmp_path) -> None:
    path = tmp_path / "agent"
    population[0].save_checkpoint(str(path))
    manifest = path / MANIFEST
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        manifest.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError):
            verify(path)


def test_the_newest_checkpoint_is_found_by_its_content_and_a_damaged_one_is_left_out(population, tmp_path) -> None:
    save(population, tmp_path / "step-000009", 1)
    save(population, tmp_path / "step-000001", 3)
    save(population, tmp_path / "whatever", 2)
    assert newest_population(tmp_path).name == "step-000001"
    file = tmp_path / "step-000001" / "agent-1" / "attributes.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-000001: agent-1/attributes.pt has \d+ bytes of \d+"):
        assert newest_population(tmp_path).name == "whatever"
    for name in ("step-000009", "whatever"):
        (tmp_path / name / MANIFEST).unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="every checkpoint is damaged"),
    ):
        newest_population(tmp_path)
    assert newest_population(tmp_path / "nowhere") is None


def test_only_the_newest_are_kept(population, tmp_path) -> None:
    for step in (1, 2, 3, 4):
        save(population, tmp_path / f"step-{step}", step)
    prune_populations(tmp_path, 2, newest=tmp_path / "step-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]


def test_two_writers_are_refused_and_a_dead_one_is_not_waited_for(tmp_path) -> None:
    with replace_folder(tmp_path / "agent") as folder:
        (folder / "attributes.pt").write_text("first")
        with pytest.raises(CheckpointError, match="another process"), replace_folder(tmp_path / "agent"):
            pass
    assert (tmp_path / "agent" / "attributes.pt").read_text() == "first"
    with only_writer(tmp_path, what=tmp_path), pytest.raises(CheckpointError), only_writer(tmp_path, what=tmp_path):
        pass
    (tmp_path / ".agent.new").mkdir()
    (tmp_path / ".agent.new" / "half").write_text("a dead process left this")
    (tmp_path / ".agent.new" / ".lock").touch()
    with replace_folder(tmp_path / "agent") as folder:
        (folder / "attributes.pt").write_text("second")
    assert sorted(path.name for path in (tmp_path / "agent").iterdir()) == ["attributes.pt", MANIFEST]


@pytest.mark.parametrize("name", ["agent-0/attributes.pt", "population.safetensors", "population.json"])
def test_a_file_that_would_run_code_is_refused_even_with_a_right_manifest(population, tmp_path, name) -> None:
    path, proof = tmp_path / "population", tmp_path / "proof"
    save(population, path, 1)

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(proof),)

    torch.save({"optimizer": Malicious()}, path / name)
    for folder in (path / "agent-0", path):
        seal(folder)
    with pytest.raises(CheckpointError):
        read_population(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("mask", "files", "folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_what_is_written_has_the_permissions_of_the_users_umask(make_agent, tmp_path, mask, files, folders) -> None:
    agent = make_agent()
    before = os.umask(mask)
    try:
        agent.save_checkpoint(str(tmp_path / "agent"), lora_only=False)
        save_merged_model(agent, tmp_path / "merged", make_tokenizer())
        save_llm_checkpoint(agent, tmp_path / "adapter")
        save_policy_archive(agent, tmp_path / "policy.pt")
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert sum(path.name == "model.safetensors" for path in found) == 2
    assert {mode for path, mode in found.items() if path.is_file()} == {files}
    assert {mode for path, mode in found.items() if path.is_dir()} == {folders}
