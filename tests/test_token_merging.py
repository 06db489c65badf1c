"Token merging against the same thing written out, one vector at a time."
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.agglomeration.token_merging import merge_tokens


def by_loops(grid, cell, keep):
    "Tokens, sizes and the token of each position of one image, (H, W, D)."
    high, wide, _ = grid.shape
    at = {(i, j): grid[i, j] for i in range(high) for j in range(wide)}
    destinations = [place for place in at if all(side % cell == cell//2 for side in place)]
    best = {}
    for place in at:
        if place in destinations: continue
        similarities = [F.cosine_similarity(at[place], at[d], dim=0).item() for d in destinations]
        best[place] = max(similarities), destinations[similarities.index(max(similarities))]
    merged = sorted(best, key=lambda place: -best[place][0])[:high*wide - keep]
    home = {place: best[place][1] if place in merged else place for place in at}
    left = sorted(set(home.values()))   # in the order of reading
    groups = [[place for place in at if home[place] == token] for token in left]
    tokens = torch.stack([torch.stack([at[place] for place in group]).mean(0) for group in groups])
    return tokens, list(map(len, groups)), [left.index(home[place]) for place in at]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_it_is_what_the_words_say(rows, columns, cell, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(2, rows*cell, columns*cell, 4, generator=generator, dtype=torch.float64)
    fewest, all_of_them = rows*columns, rows*columns*cell**2
    keep = int(torch.randint(fewest, all_of_them + 1, (), generator=generator))
    merged = merge_tokens(grid, cell, keep)
    for i in range(2):
        tokens, sizes, token_of = by_loops(grid[i], cell, keep)
        assert_close(merged.tokens[i], tokens)
        assert merged.sizes[i].tolist() == sizes and merged.token_of[i].flatten().tolist() == token_of
    assert_close(merge_tokens(merged.grid(), cell, keep).grid().mean((1, 2)), grid.mean((1, 2)))


def test_the_gradient_goes_through_and_half_precision_stays():
    grid = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: merge_tokens(x, 2, 7).tokens, grid)
    assert merge_tokens(grid.detach().bfloat16(), 2).tokens.dtype == torch.bfloat16


def test_an_image_of_768_pixels_is_256_vectors():
    "The case of the RADIOv2.5 paper: 48 × 48 positions, a destination for every 3 × 3 of them, 2048 merged."
    merged = merge_tokens(torch.randn(1, 48, 48, 4, generator=torch.Generator().manual_seed(0)), 3)
    assert merged.tokens.shape == (1, 256, 4) and merged.sizes.sum() == 2304
