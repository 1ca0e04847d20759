import pytest

from pysparse_ticket.models import CifarResNet, Mlp
from pysparse_ticket.search.mapping import check_stage, read_mapping, stage_mapping, write_mapping
from pysparse_ticket.search.units import find_stages, named_stages
from pysparse_ticket.ticket import fingerprint

APPEND = "0:0;1:1,5;2:2,6;3:3,7;4:4,8"
INTERPOLATE = "0:0;1:1,2;2:3,4;3:5,6;4:7,8"


# a CIFAR ResNet of depth 6 D + 2 has D units a stage: 14: 2, 20: 3, 32: 5, 44: 7, 56: 9
@pytest.mark.parametrize(
    ("source", "target", "order", "units", "text"),
    [
        (5, 9, "append", None, APPEND),
        (5, 9, "interpolate", None, INTERPOLATE),
        (9, 5, "append", None, "0:0;1:1;2:2;3:3;4:4"),
        (9, 5, "interpolate", None, "0:0;1:1;3:2;5:3;7:4"),
        (3, 9, "append", None, "0:0;1:1,3,5,7;2:2,4,6,8"),  # 8 / 2: four copies of both
        (3, 9, "interpolate", None, "0:0;1:1,2,3,4;2:5,6,7,8"),
        (2, 3, "append", None, "0:0;1:1,2"),
        (5, 7, "append", None, "0:0;1:1,5;2:2,6;3:3;4:4"),  # 2 more than 4: the earliest two again
        (5, 7, "interpolate", None, "0:0;1:1,2;2:3,4;3:5;4:6"),
        (7, 5, "interpolate", None, "0:0;1:1;3:2;5:3;6:4"),  # its inverse
        (3, 6, "append", None, "0:0;1:1,3,5;2:2,4"),  # 5 = 3 + 2
        (5, 9, "append", 1, "0:0;1:1,5,6,7,8;2:2;3:3;4:4"),  # B1 alone, five times
        (5, 9, "append", 2, "0:0;1:1,5,7;2:2,6,8;3:3;4:4"),
        (5, 9, "interpolate", 2, "0:0;1:1,2,3;2:4,5,6;3:7;4:8"),
        (5, 5, "append", None, "0:0;1:1;2:2;3:3;4:4"),
        (5, 5, "interpolate", None, "0:0;1:1;2:2;3:3;4:4"),
        (3, 1, "append", None, "0:0"),
        (3, 1, "interpolate", None, "0:0"),
        (1, 1, "append", None, "0:0"),
    ],
)
def test_rule_of_one_stage(source, target, order, units, text):
    assert write_mapping([stage_mapping(source, target, order, units)]) == text


@pytest.mark.parametrize("order", ["append", "interpolate"])
def test_a_squeeze_undoes_the_stretch_of_its_order(order):
    for source in range(2, 9):
        for target in range(source, 20):
            there = stage_mapping(source, target, order)
            filled = {place: unit for unit, places in there.items() for place in places}
            assert sorted(filled) == list(range(target))
            back = stage_mapping(target, source, order)
            assert [filled[unit] for unit in sorted(back, key=back.get)] == list(range(source))


def test_strings_are_read_and_written():
    append = {0: (0,), 1: (1, 5), 2: (2, 6), 3: (3, 7), 4: (4, 8)}
    assert read_mapping(APPEND) == (append,)
    assert write_mapping([append] * 3) == APPEND  # equal stages are written once
    text = "0:0;1:1|0:0;1:1,2|0:0;1:1,3;2:2|0:0;1:1"
    assert write_mapping(read_mapping(text)) == text
    assert read_mapping(" 0 : 0 ; 1 : 1 , 2 ; ") == ({0: (0,), 1: (1, 2)},)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "src:dst"),
        ("0:0;1", "'1' is not src:dst"),
        ("0:0;1:", "src:dst"),
        ("0:0;1:-1", "src:dst"),
        ("0:0|", "src:dst"),
        ("0:0;1:1,2;2:2", "target unit 2 twice"),
        ("0:0|0:0;1:1,1", "stage 2 of the mapping assigns target unit 1 twice"),
        ("0:0;1:1;1:2", "source unit 1 twice"),
    ],
)
def test_bad_strings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_mapping(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:0;1:1;3:2", "names source unit 3, but the source has units 0 to 2"),
        ("0:0;1:1;2:3", "fills target unit 3, but the target has units 0 to 2"),
        ("0:0;1:1", "leaves target unit 2 empty"),
        ("1:1;2:2", "leaves target unit 0 empty"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=f"stage 4 .*{message}"):
        check_stage(read_mapping(text)[0], 3, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 5, "middle"), "unknown order"), ((1, 2), "no normal unit"), ((3, 5, "append", 3), "1 to 2")],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        stage_mapping(*arguments)


def names(model):
    return [["/".join(unit) for unit in stage] for stage in find_stages(dict(fingerprint(model)))]


def test_stages_of_a_resnet():
    assert names(CifarResNet(20, width=4)) == [[f"stage{s}.{i}" for i in range(3)] for s in (1, 2, 3)]


def test_stages_of_an_mlp_end_with_the_narrow_layers():
    # 20 -> 6 opens the stage, 6 -> 6 are its normal units; 6 -> 5 and the classifier stand alone
    assert names(Mlp([20, 6, 6, 6, 5, 3])) == [["layers.0", "layers.1", "layers.2"], ["layers.3"], ["layers.4"]]
    # a classifier of the stage's own shape is still the classifier
    assert names(Mlp([6, 6, 6])) == [["layers.0"], ["layers.1"]]


def test_stages_of_one_long_container():
    block = {"conv1.weight": (4, 4, 3, 3), "conv2.weight": (4, 4, 3, 3)}
    wider = {"conv1.weight": (8, 4, 3, 3), "conv2.weight": (8, 8, 3, 3), "side.0.weight": (8, 4, 1, 1)}
    wide = {"conv1.weight": (8, 8, 3, 3), "conv2.weight": (8, 8, 3, 3)}
    children = [{"weight": (4, 3, 3, 3)}, {"weight": (4,)}, block, block, wider, wide, wide, {"weight": (10, 8)}]
    shapes = {f"{i}.{name}": shape for i, child in enumerate(children) for name, shape in child.items()}
    assert find_stages(shapes) == tuple(tuple((str(i),) for i in stage) for stage in [[0], [1], [2, 3], [4, 5, 6], [7]])


def test_a_sequential_of_stages_is_no_stage():
    inner = {f"1.{i}.{part}": (4, 4) for i in range(3) for part in ("a.weight", "b.weight")}
    shapes = {"0.weight": (4, 2)} | inner | {"2.weight": (3, 4)}
    assert find_stages(shapes) == ((("1.0",), ("1.1",), ("1.2",)),)


def test_a_stage_ends_where_shapes_change():
    def units(*sizes):  # (in, hidden, out)
        return {
            f"a.{i}.{name}.weight": shape
            for i, (into, hidden, out) in enumerate(sizes)
            for name, shape in (("x", (hidden, into)), ("y", (out, hidden)))
        }

    def indices(*sizes):
        return [[int(unit[0].split(".")[1]) for unit in stage] for stage in find_stages(units(*sizes))]

    assert indices((4, 8, 8), (8, 8, 8), (8, 8, 8)) == [[0, 1, 2]]
    assert indices((4, 8, 8), (8, 8, 8), (8, 16, 8)) == [[0, 1], [2]]  # another kind of unit
    assert indices((4, 8, 8), (6, 8, 6), (6, 8, 6)) == [[0], [1, 2]]  # takes something else than unit 0 returns


def test_stages_by_name():
    shapes = {"a.0.w": (1,), "a.10.w": (1,), "a.2.w": (1,), "b.w": (1,), "b.x.w": (1,)}
    assert named_stages(["a"], shapes) == ((("a.0",), ("a.2",), ("a.10",)),)
    assert named_stages([["a.0", ("a.2", "b")]], shapes) == ((("a.0",), ("a.2", "b")),)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["b"], "'b' holds no numbered modules"),
        (["nowhere"], "'nowhere' holds no numbered modules"),
        ([["a.0", "a.7"]], "'a.7' is no module with parameters"),
        ([["a.0", "a.0"]], "'a.0' is named as two units"),
    ],
)
def test_bad_stage_names_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        named_stages(stages, {"a.0.w": (1,), "a.1.w": (1,), "b.w": (1,)})
