import copy
import json

import pytest
import torch
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.models import CifarResNet, ImageNetResNet, Mlp, Vgg
from pysparse_ticket.scores import prunable
from pysparse_ticket.scores.gradient import snip
from pysparse_ticket.search.mapping import read_mapping
from pysparse_ticket.ticket import fingerprint

PRUNABLE = {14: 174_128, 20: 270_896, 32: 464_432, 44: 657_968, 56: 851_504, 110: 1_722_416}


def resnet(depth, width=2):
    return CifarResNet(depth, in_channels=1, num_classes=3, width=width)


def mlp(n):
    return Mlp([7, *[5] * n, 4, 3])


def ticket_of(model, sparsity=0.6, seed=0, **provenance):
    """A ticket whose rewind state holds a different number in every place of every entry."""
    generator = torch.Generator().manual_seed(seed)
    state, position = {}, 1
    for name, tensor in model.state_dict().items():
        values = torch.arange(position, position + tensor.numel(), dtype=torch.float64)
        state[name] = values.reshape(tensor.shape).to(tensor.dtype)
        position += tensor.numel()
    masks = {n: torch.rand(w.shape, generator=generator) > sparsity for n, w in prunable(model).items()}
    return pst.Ticket(masks=masks, rewind=state, architecture=fingerprint(model), provenance=provenance)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def block(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("order", ["append", "interpolate"])
@pytest.mark.parametrize("model", [resnet(20), mlp(3)], ids=["resnet", "mlp"])
def test_the_identity_transfer_is_the_identity(model, order):
    ticket = ticket_of(model)
    result = pst.elastic(ticket, model, model, order)
    assert same(result.masks, ticket.masks) and same(result.rewind, ticket.rewind)
    assert result.architecture == ticket.architecture and result.sparsity == ticket.sparsity


@pytest.mark.parametrize("order", ["append", "interpolate"])
@pytest.mark.parametrize("sizes", [(14, 20), (20, 44), (32, 44)], ids=str)
def test_stretched_and_squeezed_back_it_is_the_source(sizes, order):
    shallow, deep = map(resnet, sizes)
    ticket = ticket_of(shallow)
    back = pst.elastic(pst.elastic(ticket, shallow, deep, order), deep, shallow, order)
    assert same(back.masks, ticket.masks) and same(back.rewind, ticket.rewind)


@pytest.mark.parametrize(
    ("order", "origins"), [("append", [0, 1, 2, 3, 4, 1, 2, 3, 4]), ("interpolate", [0, 1, 1, 2, 2, 3, 3, 4, 4])]
)
def test_every_entry_of_a_stretched_resnet(order, origins):
    source, target = resnet(32), resnet(56)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, target, order)
    for stage in ("stage1", "stage2", "stage3"):
        for place, unit in enumerate(origins):
            for ours, theirs in ((result.masks, ticket.masks), (result.rewind, ticket.rewind)):
                assert same(block(ours, f"{stage}.{place}"), block(theirs, f"{stage}.{unit}"))
    assert "stage2.4.norm1.running_var" in result.rewind and "stage3.8.norm2.num_batches_tracked" in result.rewind
    for name in ("stem.weight", "stem_norm.running_mean", "fc.weight", "fc.bias"):
        assert torch.equal(result.rewind[name], ticket.rewind[name])
    assert result.rewind.keys() == target.state_dict().keys() and result.masks.keys() == prunable(target).keys()
    result.restore(target)  # shapes and names are the target's


def test_what_comes_out_shares_no_memory():
    source = resnet(14)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, resnet(20))
    tensors = [*ticket.rewind.values(), *ticket.masks.values(), *result.rewind.values(), *result.masks.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("control", [None, "random-mask", "reinit", "snip-added"])
def test_neither_network_nor_the_random_state_moves(control):
    source, target = resnet(14), resnet(20)
    ticket = ticket_of(source)
    before = [copy.deepcopy(thing) for thing in (source.state_dict(), target.state_dict(), ticket.rewind, ticket.masks)]
    draws = torch.get_rng_state()
    batch = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))
    pst.elastic(ticket, source, target, control=control, batches=batch)
    after = (source.state_dict(), target.state_dict(), ticket.rewind, ticket.masks)
    assert all(same(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(draws, torch.get_rng_state()) and target.training


@pytest.mark.parametrize("depth", PRUNABLE)
def test_prunable_weights_of_the_papers_resnets(depth):
    result = pst.elastic(ticket_of(CifarResNet(20)), None, fingerprint(CifarResNet(depth)))
    assert sum(mask.numel() for mask in result.masks.values()) == PRUNABLE[depth]


def test_a_squeezed_resnet_keeps_the_earliest_blocks():
    source = resnet(32)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, resnet(20))
    assert result.provenance["mapping"] == "0:0;1:1;2:2"
    kept = {
        n: t for n, t in ticket.rewind.items() if not n.startswith(tuple(f"stage{s}.{i}." for s in "123" for i in "34"))
    }
    assert same(result.rewind, kept)


def test_the_first_units_alone_are_repeated():
    source = resnet(32)
    result = pst.elastic(ticket_of(source), source, resnet(56), units=1)
    assert result.provenance["mapping"] == "0:0;1:1,5,6,7,8;2:2;3:3;4:4"
    assert result.provenance["units"] == 1


def test_sparsity_is_reported_beside_the_sources():
    # 7 -> 5 -> 5 -> 4 -> 3: 35 + 25 + 20 + 12 = 92 weights; the 25 lose 20, the others 10 in all: 30 / 92
    source, target = mlp(2), mlp(4)
    ticket = ticket_of(source, 0, rewind_step=200)
    for name, count in (("layers.0.weight", 10), ("layers.1.weight", 20)):
        ticket.masks[name] = torch.arange(ticket.masks[name].numel()).reshape(ticket.masks[name].shape) >= count
    for name in ("layers.2.weight", "layers.3.weight"):
        ticket.masks[name].fill_(True)
    assert ticket.sparsity == 30 / 92
    result = pst.elastic(ticket, source, target)
    # two copies more of the 25: 142 weights, of which 30 + 40 are gone
    assert result.provenance["source_sparsity"] == 30 / 92
    assert result.provenance["sparsity"] == result.sparsity == 70 / 142
    assert result.provenance["rewind_step"] == 200 and result.provenance["source"] == {"rewind_step": 200}
    assert result.provenance["mapping"] == "0:0;1:1,2,3"
    json.dumps(result.provenance)


def test_an_mlp_keeps_its_narrow_layers_and_classifier_at_the_end():
    source, target = mlp(2), mlp(3)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, target)
    for place, unit in enumerate([0, 1, 1, 2, 3]):
        assert torch.equal(result.masks[f"layers.{place}.weight"], ticket.masks[f"layers.{unit}.weight"])
        assert torch.equal(result.rewind[f"layers.{place}.bias"], ticket.rewind[f"layers.{unit}.bias"])
    assert torch.equal(pst.elastic(result, target, source).rewind["layers.3.weight"], ticket.rewind["layers.3.weight"])


# normal units: VGG-13 has 1 1 1 1 1 a stage, VGG-16 1 1 2 2 2, VGG-19 1 1 3 3 3; ResNet-18 1 1 1 1, -26 1 2 3 2
ONE, TWO, THREE = "0:0;1:1", "0:0;1:1;2:2", "0:0;1:1;2:2;3:3"


@pytest.mark.parametrize(
    ("make", "shallow", "deep", "order", "there", "back"),
    [
        (Vgg, 13, 16, "append", [ONE] * 2 + ["0:0;1:1,2"] * 3, [ONE]),
        (Vgg, 16, 19, "append", [ONE] * 2 + ["0:0;1:1,3;2:2"] * 3, [ONE] * 2 + [TWO] * 3),
        (Vgg, 16, 19, "interpolate", [ONE] * 2 + ["0:0;1:1,2;2:3"] * 3, [ONE] * 2 + ["0:0;1:1;3:2"] * 3),
        (ImageNetResNet, 18, 26, "append", [ONE, "0:0;1:1,2", "0:0;1:1,2,3", "0:0;1:1,2"], [ONE]),
        (
            ImageNetResNet,
            *(26, 34, "append"),
            ["0:0;1:1,2", "0:0;1:1,3;2:2", "0:0;1:1,4;2:2,5;3:3", TWO],
            [ONE, TWO, THREE, TWO],
        ),
    ],
    ids=["vgg13-16", "vgg16-19", "vgg16-19 interpolated", "resnet18-26", "resnet26-34"],
)
def test_vgg_and_imagenet_resnets_by_stages(make, shallow, deep, order, there, back):
    source, target = make(shallow, 3, width=1), make(deep, 3, width=1)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, target, order)
    assert result.provenance["mapping"] == "|".join(there)
    for number, stage in enumerate(read_mapping("|".join(there)), 1):
        for unit, places in stage.items():
            for place in places:
                ours, theirs = f"stage{number}.{place}", f"stage{number}.{unit}"
                assert same(block(result.rewind, ours), block(ticket.rewind, theirs))
                assert same(block(result.masks, ours), block(ticket.masks, theirs))
    result.restore(target)
    again = pst.elastic(result, target, source, order)
    assert again.provenance["mapping"] == "|".join(back) and same(again.rewind, ticket.rewind)


def test_a_vgg_keeps_its_linear_layers():
    source, target = Vgg(13, 3, width=1, linear=3), Vgg(16, 3, width=1, linear=3)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, target)
    assert same(block(result.rewind, "linear"), block(ticket.rewind, "linear"))
    with pytest.raises(pst.TicketError, match=r"linear.1.weight of the target has shape \[3, 8\]"):
        pst.elastic(ticket, source, Vgg(16, 3, width=1, linear=2))


def encoder(layers):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.ModuleDict(
        {"embed": nn.Linear(3, 4), "layers": nn.TransformerEncoder(layer, layers), "head": nn.Linear(4, 2)}
    )


@pytest.mark.parametrize(
    "stages",
    [
        None,
        ["layers.layers"],
        ([[f"layers.layers.{i}" for i in range(3)]], [[f"layers.layers.{i}" for i in range(5)]]),
    ],
    ids=["found", "container", "unit names"],
)
def test_transformer_layers(stages):
    source, target = encoder(3), encoder(5)
    ticket = ticket_of(source)
    result = pst.elastic(ticket, source, target, stages=stages)
    for place, unit in enumerate([0, 1, 2, 1, 2]):
        ours, theirs = (block(t.rewind, f"layers.layers.{i}") for t, i in ((result, place), (ticket, unit)))
        assert same(ours, theirs) and "self_attn.in_proj_weight" in ours
    assert torch.equal(result.rewind["embed.weight"], ticket.rewind["embed.weight"])
    result.restore(target)
    free = pst.elastic(ticket, source, target, stages=stages, mapping="2:0,1,2;0:3;1:4")
    assert same(block(free.rewind, "layers.layers.1"), block(ticket.rewind, "layers.layers.2"))


def test_units_of_several_modules():
    def flat(n):
        return nn.Sequential(*(m for _ in range(n) for m in (nn.Linear(3, 3), nn.BatchNorm1d(3))), nn.Linear(3, 2))

    source, target = flat(2), flat(3)
    ticket = ticket_of(source)
    with pytest.raises(pst.TicketError, match=r"5 stages, the target 7.*stages="):
        pst.elastic(ticket, source, target)
    pairs = [[[(str(2 * i), str(2 * i + 1)) for i in range(n)], [str(2 * n)]] for n in (2, 3)]
    result = pst.elastic(ticket, source, target, stages=pairs)
    for ours, theirs in (("4.weight", "2.weight"), ("5.running_var", "3.running_var"), ("6.bias", "4.bias")):
        assert torch.equal(result.rewind[ours], ticket.rewind[theirs])
    assert torch.equal(result.masks["4.weight"], ticket.masks["2.weight"])
    result.restore(target)


def test_fingerprints_will_do_for_models():
    source, target = resnet(14), resnet(20)
    ticket = ticket_of(source)
    by_model = pst.elastic(ticket, source, target)
    by_names = pst.elastic(ticket, fingerprint(source), fingerprint(target))
    assert same(by_model.rewind, by_names.rewind) and same(by_model.masks, by_names.masks)
    assert by_model.architecture == by_names.architecture


def test_a_saved_transfer_comes_back(tmp_path):
    result = pst.elastic(ticket_of(mlp(2)), None, mlp(3))
    result.save(tmp_path / "t")
    loaded = pst.Ticket.load(tmp_path / "t", mlp(3))
    assert same(loaded.rewind, result.rewind) and loaded.provenance == result.provenance


def test_random_masks_keep_each_tensors_count_and_the_weights():
    source, target = resnet(14, width=8), resnet(20, width=8)
    plain = pst.elastic(ticket_of(source), source, target)
    mixed = pst.elastic(ticket_of(source), source, target, control="random-mask", seed=3)
    assert same(mixed.rewind, plain.rewind)
    assert all(mixed.masks[n].sum() == plain.masks[n].sum() for n in plain.masks)
    assert not any(torch.equal(mixed.masks[n], plain.masks[n]) for n in plain.masks)
    assert same(pst.elastic(ticket_of(source), source, target, control="random-mask", seed=3).masks, mixed.masks)
    added = pst.elastic(ticket_of(source), source, target, control="random-added").masks
    moved = {n for n in plain.masks if not torch.equal(added[n], plain.masks[n])}
    assert moved == {n for n in plain.masks if n.split(".")[0].startswith("stage") and n.split(".")[1] == "2"}


def test_reinit_takes_the_targets_own_weights():
    source, target = resnet(14), resnet(20)
    result = pst.elastic(ticket_of(source), source, target, control="reinit")
    assert same(result.rewind, target.state_dict())
    assert same(result.masks, pst.elastic(ticket_of(source), source, target).masks)
    assert result.rewind["fc.weight"].data_ptr() != target.fc.weight.data_ptr()


def test_snip_masks_the_added_units_at_the_sources_sparsity():
    source, target = mlp(2), mlp(4)
    torch.manual_seed(0)
    ticket = ticket_of(source, 0.4)
    for name in ("layers.2.weight", "layers.3.weight"):
        ticket.masks[name].fill_(True)
    # positive throughout, so that no unit is dead and no score is 0
    ticket.rewind = {n: torch.rand(t.shape) / 4 for n, t in ticket.rewind.items()}
    x, y = torch.rand(6, 7), torch.tensor([0, 1, 2, 0, 1, 2])
    result = pst.elastic(ticket, source, target, control="snip-added", batches=(x, y))
    plain = pst.elastic(ticket, source, target)
    assert same(result.rewind, plain.rewind)
    added = ["layers.2.weight", "layers.3.weight"]
    assert same(
        {n: m for n, m in result.masks.items() if n not in added},
        {n: m for n, m in plain.masks.items() if n not in added},
    )
    assert sum(int(result.masks[n].sum()) for n in added) == round((1 - ticket.sparsity) * 50)
    plain.restore(target)  # the same by hand: SNIP with the copies whole and the others masked
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if name in plain.masks and name not in added:
                weight *= plain.masks[name]
    scores = snip(target, (x, y))
    lowest_kept = min(float(scores[n][result.masks[n]].min()) for n in added)
    highest_gone = max(float(scores[n][~result.masks[n]].max()) for n in added)
    assert lowest_kept > highest_gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "0:0;1:1"}, "stage 1 of the mapping leaves target unit 2 empty"),
        ({"mapping": "0:0;1:1;2:2"}, "stage 1 of the mapping names source unit 2, but the source has units 0 to 1"),
        ({"mapping": "0:0;1:1,2,2"}, "target unit 2 twice"),
        ({"mapping": "0:0;1:1,2|0:0;1:1,2"}, "the mapping has 2 stages, the networks have 3"),
        ({"mapping": "0:0,1,2"}, "stage2.1.conv1.weight of the target has shape"),
        ({"order": "middle"}, "unknown order 'middle'; known: append, interpolate"),
        ({"units": 2}, "units must be 'all' or 1 to 1"),
        ({"units": "some"}, "'some'"),
        ({"control": "none"}, "unknown control 'none'; known: random-mask"),
        ({"control": "snip-added"}, "needs data"),
        ({"stages": "stage1"}, "list of container names"),
        ({"stages": ["stage1", ["x"]]}, "list of container names"),
        ({"stages": ["stage1"]}, "stage2.2.conv1.weight of the target has no counterpart"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    source = resnet(14)
    with pytest.raises(ValueError, match=message):
        pst.elastic(ticket_of(source), source, resnet(20), **options)


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        ({}, mlp(3), "layers.0.weight of the target has no counterpart"),
        ({}, resnet(20, width=4), "has shape .* depth alone"),
        ({}, CifarResNet(20, 10, 1, 2), "fc.weight of the target has shape"),
        ({"rewind": None}, resnet(20), "no rewind state"),
        ({"layers": {"stage1.1": False}}, resnet(20), "removes layers"),
        ({"filters": {"stem": torch.ones(2, dtype=torch.bool)}}, resnet(20), "removes filters"),
        ({"architecture": ()}, resnet(20), "pass the source model"),
        ({"rewind": {}}, resnet(20), "rewind state lacks stem.weight"),
    ],
    ids=[
        "another family",
        "another width",
        "other classes",
        "no rewind",
        "layers",
        "filters",
        "anonymous",
        "empty",
    ],
)
def test_tickets_that_do_not_fit_are_refused(change, target, message):
    ticket = ticket_of(resnet(14))
    for name, value in change.items():
        setattr(ticket, name, value)
    with pytest.raises(pst.TicketError, match=message):
        pst.elastic(ticket, None, target)


def test_a_ticket_of_another_source_is_refused():
    with pytest.raises(pst.TicketError, match="another architecture"):
        pst.elastic(ticket_of(resnet(14)), resnet(20), resnet(32))
    with pytest.raises(pst.TicketError, match="another architecture"):
        pst.elastic(ticket_of(resnet(14)), fingerprint(resnet(20)), resnet(32))


def test_what_has_nothing_to_repeat_is_refused():
    with pytest.raises(ValueError, match="no normal unit"):
        pst.elastic(ticket_of(mlp(1)), None, mlp(2))
    with pytest.raises(ValueError, match="adds none"):
        pst.elastic(
            ticket_of(mlp(3)), None, mlp(2), control="snip-added", batches=(torch.ones(1, 7), torch.tensor([0]))
        )
    with pytest.raises(ValueError, match="needs the target as a model"):
        pst.elastic(ticket_of(mlp(2)), None, fingerprint(mlp(3)), control="reinit")


def test_an_entry_without_a_place_is_refused():
    source = mlp(2)
    source.gate = nn.Linear(2, 2)
    for target in (mlp(3), fingerprint(mlp(3))):
        with pytest.raises(pst.TicketError, match=r"gate.weight of the source has no place in the target"):
            pst.elastic(ticket_of(source), source, target)


def test_unit_names_that_collide_are_refused():
    ticket = ticket_of(mlp(2))  # its layers.2 is no unit here, so it stays at layers.2
    with pytest.raises(pst.TicketError, match=r"layers.2.weight of the target would be written twice"):
        pst.elastic(ticket, None, mlp(2), stages=([["layers.0", "layers.1"]], [["layers.0", "layers.2"]]))
    with pytest.raises(ValueError, match="has 2 modules"):
        pst.elastic(ticket, None, mlp(2), stages=([[("layers.0", "layers.1")]], [["layers.0"]]))
