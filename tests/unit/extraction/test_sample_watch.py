"""One prompt's runs, watched: running means always, samples as far as they fit."""

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.capture import ActivationSums
from medsteer_core.extraction.sample_watch import SampleWatch

SITES, LEVELS, WIDTH = ("a", "b"), (4.0, 2.0, 1.0), 5


def activation(image, site, level):
    seed = image * 100 + SITES.index(site) * 10 + int(level)
    return torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def watch(batches, **options):
    """A watch after runs of these batches of images."""
    watched = SampleWatch(ActivationSums(), sum(len(images) for images in batches), **options)
    for images in batches:
        with watched.run(images):
            for level in LEVELS:
                for site in SITES:
                    watched.observe(site, level, torch.cat([activation(image, site, level) for image in images]))
    return watched


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[0], [1], [2], [3], [4]]])
def test_the_record_holds_every_samples_token_mean_in_the_order_of_the_runs(batches):
    record = watch(batches).record()
    assert record.samples.tolist() == [0, 1, 2, 3, 4] and record.sigmas.tolist() == list(LEVELS)
    for site in SITES:
        wanted = torch.stack([torch.cat([activation(i, site, lv).mean(1) for lv in LEVELS]) for i in range(5)])
        torch.testing.assert_close(record.sites[site], wanted)


def test_the_running_means_are_those_without_a_record():
    alone = watch([[0, 1], [2]], wanted=False)
    beside = watch([[0, 1], [2]])
    assert alone.record() is None and beside.record().count == 3
    for site, statistics in alone.sums.statistics().items():
        assert torch.equal(statistics.mean, beside.sums.statistics()[site].mean)
        assert torch.equal(statistics.variance, beside.sums.statistics()[site].variance)


def test_the_record_is_given_up_after_the_first_run_when_all_samples_would_not_fit():
    """Two sites of 3 levels and 5 channels are 120 bytes a sample."""
    assert watch([[0, 1], [2]], most_bytes=360).record().count == 3
    over = watch([[0, 1], [2]], most_bytes=359)
    assert over.record() is None and over.sums.statistics()["a"].count.tolist() == [3, 3, 3]
    assert over.left_out == "The activations of 3 samples take 0.0 GB, and at most 3.59e-07 GB are kept."
    with pytest.raises(MedSteerError, match="are kept. Set fewer samples or steps, or the estimator mean difference"):
        watch([[0, 1], [2]], most_bytes=359, needed=True)


def test_what_can_not_be_recorded_is_an_error_only_where_it_is_needed():
    """A cache that skips a step in one of two runs."""

    def skipping(needed):
        watched = SampleWatch(ActivationSums(), 2, needed)
        for image, levels in ((0, LEVELS), (1, LEVELS[:2])):
            with watched.run([image]):
                for level in levels:
                    watched.observe("a", level, activation(image, "a", level))
        return watched

    watched = skipping(needed=False)
    assert watched.record() is None and "3 noise levels from 4 to 1 and at 2 noise levels" in watched.left_out
    assert watched.sums.statistics()["a"].count.tolist() == [2, 2, 1]
    with pytest.raises(MedSteerError, match="every sample and site needs the same noise levels"):
        skipping(needed=True).record()


def test_a_run_that_was_cancelled_leaves_no_samples():
    watched = SampleWatch(ActivationSums(), 1)
    with pytest.raises(KeyboardInterrupt), watched.run([0]):
        watched.observe("a", 4.0, activation(0, "a", 4.0))
        raise KeyboardInterrupt
    assert watched.record() is None
