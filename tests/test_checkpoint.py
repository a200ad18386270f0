import pytest
import torch

from microdit.checkpoint import latest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from microdit.errors import UserError


def save(run, step, value=1.0, keep=2):
    return save_checkpoint(run, step, {"model": {"w": torch.full((3,), value)}}, {"note": step}, keep)


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, float(step))
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert (found.step, found.state["note"]) == (10, 10)
    assert found.tensors("model")["w"].tolist() == [10, 10, 10]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000010"]


def test_no_run_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere", pytest.fail) is None


def test_a_part_that_was_never_finished_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.part").mkdir()
    assert latest_checkpoint(tmp_path, pytest.fail).step == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "state"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "state.json").write_text("{}")
    said = []
    assert latest_checkpoint(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert "step-00000002 is damaged" in said[0]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    in_the_way = tmp_path / "checkpoints" / "step-00000002"
    in_the_way.write_text("not a folder")
    with pytest.raises(UserError, match="Earlier checkpoints are intact"):
        save(tmp_path, 2)
    in_the_way.unlink()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path, pytest.fail).step == 1


def test_the_optimizers_state_goes_on_where_it_was():
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]

    def step(index, value):
        for weight in models[index].parameters():
            weight.grad = torch.full_like(weight, value)
        optimizers[index].step()

    step(0, 0.5)
    models[1].load_state_dict(models[0].state_dict())
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers[0], models[0]).items()}
    restore_optimizer(optimizers[1], models[1], saved)
    for index in (0, 1):
        step(index, -0.2)
    assert torch.equal(models[0].weight, models[1].weight)
