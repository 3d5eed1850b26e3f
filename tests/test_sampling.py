"""The sampling of the example engine: draws are those of the chances, and depend on nothing but their request."""

import pytest

torch = pytest.importorskip("torch")

from examples.sampling import Choice, draw, likeliest, uniform  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHANCES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def choices(count, temperature=1.0, top_p=1.0, device="cpu"):
    """Requests with the seeds 0, 1, 2 and so on."""
    full = [torch.tensor([value] * count, dtype=torch.float32) for value in (temperature, top_p)]
    made = Choice(*full, torch.arange(count), torch.zeros(count, dtype=torch.int64))
    return Choice(*(one.to(device) for one in made))


def shares(drawn):
    return torch.bincount(drawn.cpu(), minlength=len(CHANCES)) / len(drawn)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_by_their_chances(device, temperature):
    many = choices(40000, temperature, device=device)
    drawn = draw(CHANCES.log().expand(40000, -1).to(device), many, False)
    expected = torch.softmax(CHANCES.log() / temperature, 0)
    assert (shares(drawn) - expected).abs().max() < 0.012  # five standard deviations of 40000 draws


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.39, 1), (0.41, 2), (0.84, 3), (0.9, 4), (1.0, 5)])
def test_top_p_keeps_the_likeliest(top_p, kept):
    order = torch.tensor([3, 0, 4, 2, 1])  # where the likeliest ones are is no matter
    logits = CHANCES.log()[order].expand(20000, -1)
    found = shares(order[draw(logits, choices(20000, top_p=top_p), True)])
    expected = CHANCES.clone()
    expected[kept:] = 0
    assert (found[kept:] == 0).all()
    assert (found - expected / expected.sum()).abs().max() < 0.018


def test_a_draw_depends_on_its_request_alone():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    many = choices(64, 0.8, 0.9)
    together = draw(logits, many, True)
    for i in (0, 7, 63):
        assert draw(logits[i : i + 1], Choice(*(part[i : i + 1] for part in many)), True) == together[i]
    order = torch.randperm(64)
    assert torch.equal(draw(logits[order], Choice(*(part[order] for part in many)), True), together[order])
    later = many._replace(count=many.count + 1)
    assert (draw(logits, later, True) != together).float().mean() > 0.5


def test_a_row_without_top_p_is_as_it_is_alone_beside_one_that_has_it():
    """Its rarest tokens stay, though the chances of the others may round to 1."""
    logits = torch.tensor([[0.0, -17.5]]).expand(2, -1)
    pair = choices(2)
    pair.top_p[1] = 0.5
    pair.seed[:] = 109361614
    assert draw(logits, pair, True)[0] == draw(logits, pair, False)[0] == 1


def test_a_temperature_of_0_takes_the_likeliest():
    logits = torch.randn(8, 100)
    mixed = choices(8)
    mixed.temperature[::2] = 0
    assert torch.equal(draw(logits, mixed, False)[::2], likeliest(logits)[::2])


@pytest.mark.parametrize("temperature", [5e-324, 1e-3, 1.0, 1e308])
@pytest.mark.parametrize("nucleus", [False, True])
def test_any_temperature_draws_a_token(temperature, nucleus):
    logits = torch.tensor([[-30.0, 40.0, 0.0, -torch.inf]]).expand(200, -1)
    drawn = draw(logits, choices(200, temperature, 0.99), nucleus)
    assert (drawn < 3).all()
    assert temperature > 1 or (drawn == 1).all()


def test_numbers_are_even_and_apart():
    drawn = uniform(torch.tensor([0, 0, 1, 2**62, -5]), torch.tensor([0, 1, 0, 0, 0]), 1 << 16)
    assert drawn.min() > 0
    assert drawn.max() < 1
    counts = torch.stack([torch.histc(row, 64, 0, 1) for row in drawn])
    assert (counts - 1024).abs().max() < 160  # five standard deviations
    apart = torch.corrcoef(drawn.double()) - torch.eye(5)
    assert apart.abs().max() < 0.02
