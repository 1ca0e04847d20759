import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.ticket import clone_state, fingerprint


def net(width=5):
    return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 3))


def ticket_of(model, density=0.4):
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters() if p.dim() > 1}
    return pst.Ticket(
        masks=masks,
        layers={"1": True},
        filters={"2": torch.tensor([True, False, True])},
        rewind=clone_state(model),
        architecture=fingerprint(model),
        provenance={"score": "random", "seed": 0},
    )


def test_saved_ticket_loads_with_every_field(tmp_path):
    model = net()
    ticket = ticket_of(model)
    ticket.save(tmp_path / "t.safetensors")
    back = pst.Ticket.load(tmp_path / "t.safetensors", model)
    assert (
        all(torch.equal(back.masks[n], m) for n, m in ticket.masks.items()) and back.masks.keys() == ticket.masks.keys()
    )
    assert torch.equal(back.filters["2"], ticket.filters["2"])
    assert all(torch.equal(back.rewind[n], t) for n, t in model.state_dict().items())
    assert (back.layers, back.architecture, back.provenance) == (ticket.layers, ticket.architecture, ticket.provenance)


def test_masks_are_bit_packed(tmp_path):
    mask = torch.rand(1000, 1000) < 0.5
    pst.Ticket(masks={"w": mask}).save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").stat().st_size < 1000 * 1000 / 8 + 1000


def test_rewind_is_a_copy():
    model = net()
    ticket = ticket_of(model)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ticket.restore(model)
    assert torch.equal(model[0].weight, before)


def test_sparsity_counts_masks_blocks_and_filters():
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(1, 4, dtype=torch.bool)}
    assert pst.Ticket(masks=masks).sparsity == 3 / 8
    architecture = (("s.0.weight", (2, 3)), ("s.1.weight", (2, 3)), ("s.1.bias", (2,)), ("fc.weight", (4, 2)))
    assert pst.Ticket(layers={"s.1": False}, architecture=architecture).sparsity == 6 / 20
    filters = {"fc": torch.tensor([True, False, False, False])}
    assert pst.Ticket(filters=filters, architecture=architecture).sparsity == 6 / 20


def test_ticket_for_another_architecture_names_the_first_difference(tmp_path):
    ticket_of(net()).save(tmp_path / "t.safetensors")
    with pytest.raises(
        pst.TicketError, match=r"parameter 0 is 0\.weight \[5, 7\] in the ticket and 0\.weight \[6, 7\]"
    ):
        pst.Ticket.load(tmp_path / "t.safetensors", net(6))
    with pytest.raises(pst.TicketError, match=r"parameter 2 is 2\.weight \[3, 5\] in the ticket and nothing more"):
        pst.Ticket.load(tmp_path / "t.safetensors", nn.Sequential(nn.Linear(7, 5)))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99], ids=lambda s: f"first-{s}")
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "t.safetensors"
    ticket_of(net()).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(pst.TicketError, match="truncated"):
        pst.Ticket.load(path)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a ticket")
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, words in (("text", "not a ticket"), ("foreign.safetensors", "not a ticket"), ("none", "no ticket at")):
        with pytest.raises(pst.TicketError, match=words):
            pst.Ticket.load(tmp_path / name)
    header = {"masks": {"w": [9]}, "filters": {}, "layers": {}, "rewind": None, "architecture": [], "provenance": {}}
    metadata = {"format": "pysparse_ticket", "version": "1", "ticket": json.dumps(header)}
    save_file({"mask/w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "short.safetensors", metadata=metadata)
    with pytest.raises(pst.TicketError, match="needs 2 bytes, the file has 1"):
        pst.Ticket.load(tmp_path / "short.safetensors")


def test_full_disk_keeps_the_old_ticket(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    ticket_of(net()).save(path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pysparse_ticket.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device; the previous one is untouched"):
        ticket_of(net()).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_overlap_by_hand():
    a = {"w": torch.tensor([[True, True, False, False]])}
    b = {"w": torch.tensor([[True, False, True, True]])}
    assert pst.overlap(a, b) == {"overlap": 1 / 2, "iou": 1 / 4, "chance": 3 / 4}
    c = {"w": torch.tensor([[True, False, False, False]])}
    assert pst.overlap(a, b, c) == {"overlap": 1 / 2, "iou": 1 / 4, "chance": 3 / 4 / 4}
    with pytest.raises(pst.TicketError, match="v is not in all of them"):
        pst.overlap(a, {"v": b["w"]})
