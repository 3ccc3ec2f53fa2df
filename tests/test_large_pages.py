"""Copies of tensors side by side in large pages."""

import mmap

import pytest
import torch

from localr1.kernels import large_pages
from localr1.kernels.large_pages import ALIGNMENT, CHUNK, LargePages


@pytest.fixture(params=[True, False], ids=["advice", "no advice"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LargePages:
    if not request.param:
        monkeypatch.setattr(large_pages, "ADVICE", None)
    elif large_pages.ADVICE is None:
        pytest.skip("a system without large pages on advice")
    return LargePages()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_copies_are_contiguous_and_apart(pages: LargePages, dtype: torch.dtype) -> None:
    sources = [torch.randn(3, 5, 7).to(dtype), torch.randn(4, 6).T.to(dtype), torch.ones(1)]
    copies = [pages.copy_of(source) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        assert torch.equal(copy, source)
        assert (copy.dtype, copy.shape) == (source.dtype, source.shape)
        assert copy.is_contiguous()
        assert copy.data_ptr() % ALIGNMENT == 0 or large_pages.ADVICE is None
    copies[1].zero_()
    assert torch.equal(copies[0], sources[0])
    assert sources[1].count_nonzero() == sources[1].numel()


def test_small_ones_share_a_chunk_and_a_large_one_has_its_own(pages: LargePages) -> None:
    if large_pages.ADVICE is None:
        pytest.skip("no chunks")
    first, second = (pages.copy_of(torch.ones(100)) for _ in range(2))
    large = pages.copy_of(torch.ones(CHUNK // 4 + 1))
    after = pages.copy_of(torch.ones(100))
    assert second.data_ptr() - first.data_ptr() == 448  # 400 bytes, at a multiple of 64.
    assert large.data_ptr() % large_pages.LARGE_PAGE == 0
    assert bool((large == 1).all())
    assert bool((after == 1).all())
    storage = first.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() == storage != large.untyped_storage().data_ptr()


def test_advice_that_is_refused_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(large_pages, "ADVICE", 14)
    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert torch.equal(LargePages().copy_of(torch.arange(9.0)), torch.arange(9.0))
