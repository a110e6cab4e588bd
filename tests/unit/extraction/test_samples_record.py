import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.capture import ActivationSums
from medsteer_core.extraction.samples_record import SampleRecord, SampleRecorder, bytes_of

SIGMAS = (8.0, 2.0)


def activations(samples=7, sites=("b.2", "b.10"), sigmas=SIGMAS, seed=0):
    """(site, sigma) -> (samples, tokens, C); widths 4 and 6, with a long common part."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (site, sigma): 30 + torch.randn(samples, 5, 4 + 2 * place, generator=generator)
        for sigma in sigmas
        for place, site in enumerate(sites)
    }


def recorded(everything, batches=((0, 3), (3, 4), (4, 7)), observers=()):
    """What a recorder keeps of runs over these batches; `observers` see the same."""
    recorder = SampleRecorder()
    for start, stop in batches:
        recorder.begin(range(start, stop))
        for (site, sigma), values in everything.items():
            for observer in (recorder, *observers):
                observer.observe(site, sigma, values[start:stop])
    return recorder.record()


def test_each_samples_token_mean_is_kept_in_the_order_of_the_samples():
    everything = activations()
    record = recorded(everything)
    assert list(record.sites) == ["b.2", "b.10"] and record.sigmas.tolist() == list(SIGMAS)
    assert record.samples.tolist() == list(range(7)) and record.count == 7
    for (site, sigma), values in everything.items():
        kept = record.sites[site][:, SIGMAS.index(sigma)]
        torch.testing.assert_close(kept, values.mean(dim=1), rtol=1e-6, atol=0)


def test_the_batches_split_nothing():
    everything = activations()
    torch.testing.assert_close(
        recorded(everything).sites["b.2"], recorded(everything, [(0, 7)]).sites["b.2"], rtol=0, atol=1e-5
    )


def test_its_statistics_are_those_of_running_sums():
    everything, sums = activations(), ActivationSums()
    record = recorded(everything, observers=[sums])
    ours, theirs = record.statistics(), sums.statistics()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name].mean, theirs[name].mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[name].variance, theirs[name].variance, rtol=1e-4, atol=0)
        assert torch.equal(ours[name].count, theirs[name].count) and torch.equal(ours[name].sigmas, theirs[name].sigmas)


def test_one_sample_has_no_variance():
    record = recorded(activations(samples=1), [(0, 1)])
    assert record.statistics()["b.2"].variance.tolist() == [0.0, 0.0]


def test_two_visits_of_one_level_count_once_and_are_averaged():
    """Heun's sampler evaluates most levels twice, the second time with another rounding of sigma."""
    first, second = torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 4.0)
    recorder = SampleRecorder()
    recorder.begin([0, 1])
    for sigma, values in ((8.0, first), (2.0, first), (2.0 * (1 + 1e-6), second)):
        recorder.observe("b", sigma, values)
    values = recorder.record().sites["b"]
    assert values.shape == (2, 2, 4) and values[:, 0].unique().item() == 1.0 and values[:, 1].unique().item() == 2.5


def test_several_conditionings_of_one_call_are_averaged_sample_by_sample():
    recorder = SampleRecorder()
    recorder.begin([0, 1])
    recorder.observe("b", 1.0, torch.tensor([[[1.0]], [[10.0]], [[3.0]], [[30.0]]]))
    assert recorder.record().sites["b"].flatten().tolist() == [2.0, 20.0]


def test_half_precision_is_averaged_in_float32():
    values = torch.full((1, 4096, 2), 100.0, dtype=torch.float16)
    values[:, ::2] = 101.0
    recorder = SampleRecorder()
    recorder.begin([0])
    recorder.observe("b", 1.0, values)
    assert recorder.record().sites["b"].flatten().tolist() == [100.5, 100.5]


def test_a_record_goes_on_with_more_samples():
    everything = activations()
    whole = recorded(everything)
    first, rest = recorded(everything, [(0, 3)]), recorded(everything, [(3, 4), (4, 7)])
    longer = first.then(rest)
    assert longer.samples.tolist() == list(range(7))
    assert all(torch.equal(longer.sites[name], whole.sites[name]) for name in whole.sites)


def test_a_record_comes_back_from_a_file_with_its_sites_in_order():
    """The file sorts its tensors by name, which is not the order of execution."""
    record = recorded(activations())
    back = SampleRecord.from_state(load(save(record.to_state())))
    assert list(back.sites) == ["b.2", "b.10"]
    assert torch.equal(back.sigmas, record.sigmas) and torch.equal(back.samples, record.samples)
    assert all(torch.equal(back.sites[name], record.sites[name]) for name in record.sites)


def test_a_file_of_something_else_is_no_record():
    with pytest.raises(MedSteerError, match="These 1 tensors are no record of samples"):
        SampleRecord.from_state({"weight": torch.ones(1)})
    with pytest.raises(MedSteerError, match="no record of samples"):
        SampleRecord.from_state({**recorded(activations()).to_state(), "weight": torch.ones(1)})


def test_memory_is_four_bytes_a_sample_level_and_channel_and_bounded():
    everything = activations()
    recorder = SampleRecorder(most_bytes=bytes_of([4, 6], 2, 3))
    recorder.begin(range(3))
    for (site, sigma), values in everything.items():
        recorder.observe(site, sigma, values[:3])
    assert 4 * recorder.stored_elements == bytes_of([4, 6], 2, 3) == 4 * 10 * 2 * 3
    recorder.begin([3])
    with pytest.raises(MedSteerError, match=r"more than 2.4e-07 GB.*fewer samples.*mean_difference"):
        recorder.observe("b.10", 8.0, everything["b.10", 8.0][3:4])


def test_what_can_not_be_recorded_is_named():
    recorder = SampleRecorder()
    with pytest.raises(MedSteerError, match="No activation was observed"):
        recorder.record()
    with pytest.raises(RuntimeError, match="begin"):
        recorder.observe("b", 1.0, torch.ones(1, 1, 1))
    recorder.begin([0, 1])
    with pytest.raises(MedSteerError, match=r"Site 'b' gave an activation of shape \(2, 3\)"):
        recorder.observe("b", 1.0, torch.ones(2, 3))
    with pytest.raises(MedSteerError, match="gave 3 rows for a batch of 2 images"):
        recorder.observe("b", 1.0, torch.ones(3, 1, 1))
    recorder.observe("b", 1.0, torch.ones(2, 1, 4))
    with pytest.raises(MedSteerError, match="Site 'b' gave 6 channels after 4"):
        recorder.observe("b", 1.0, torch.ones(2, 1, 6))


def test_activations_that_are_not_finite_name_site_and_sigma():
    everything = activations()
    everything["b.2", 2.0][4, 0, 0] = float("nan")
    with pytest.raises(MedSteerError, match=r"Site 'b.2' gave NaN or infinite activations at sigma 2;"):
        recorded(everything)


def test_a_run_that_is_not_complete_is_no_record():
    recorder = SampleRecorder()
    for samples, sigmas in (([0], (8.0, 2.0)), ([1], (8.0,))):
        recorder.begin(samples)
        for sigma in sigmas:
            recorder.observe("b", sigma, torch.ones(1, 1, 4))
    with pytest.raises(MedSteerError, match="2 noise levels from 8 to 2 and at 1 noise levels from 8 to 8"):
        recorder.record()


def test_sites_that_saw_other_levels_or_runs_that_saw_other_sites_are_refused():
    recorder = SampleRecorder()
    recorder.begin([0])
    recorder.observe("b", 8.0, torch.ones(1, 1, 4))
    recorder.observe("c", 7.0, torch.ones(1, 1, 4))
    with pytest.raises(MedSteerError, match="every sample and site needs the same noise levels"):
        recorder.record()
    recorder = SampleRecorder()
    for sample, site in enumerate("bc"):
        recorder.begin([sample])
        recorder.observe(site, 8.0, torch.ones(1, 1, 4))
    with pytest.raises(MedSteerError, match=r"different sites \(b, c\)"):
        recorder.record()


def test_what_does_not_continue_a_record_is_refused():
    record = recorded(activations())
    with pytest.raises(MedSteerError, match="names a sample twice"):
        record.then(record)
    more = dataclasses.replace(record, samples=record.samples + 7)
    with pytest.raises(MedSteerError, match="2 sites can't go on with samples of 1: b.2"):
        record.then(dataclasses.replace(more, sites={"b.10": more.sites["b.10"]}))
    with pytest.raises(MedSteerError, match="'b.10' has 6 channels in the record and 5"):
        record.then(dataclasses.replace(more, sites={**more.sites, "b.10": more.sites["b.10"][..., :5].clone()}))
    with pytest.raises(MedSteerError, match="from 8 to 2 and at 2 noise levels from 8 to 1.9"):
        record.then(dataclasses.replace(more, sigmas=torch.tensor([8.0, 1.9])))
    with pytest.raises(MedSteerError, match=r"Site 'b' of a record is torch.float32 of shape \(2, 3, 4\)"):
        SampleRecord({"b": torch.ones(2, 3, 4)}, torch.tensor([8.0, 2.0]), torch.arange(2))
