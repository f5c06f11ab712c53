"""What stands in for the device itself: properties, streams, events, memory, random state."""

from __future__ import annotations

import gc
import logging
import os

import torch
from registry import check, is_on_the_cpu

# Devices, properties, nvtx


@check
def device_functions():
    assert torch.cuda.is_available() is True and torch.cuda.is_initialized() is True
    assert torch.cuda.device_count() == 1
    torch.cuda.init()
    torch.cuda.set_device(0)
    torch.cuda.set_device("cuda:0")
    device = torch.cuda.current_device()
    assert is_on_the_cpu(torch.zeros(2, device=device), 2)
    with torch.cuda.device(device):
        assert is_on_the_cpu(torch.zeros(2, device=torch.cuda.current_device()), 2)
    torch.cuda.synchronize()
    torch.cuda.synchronize(device)


@check
def properties_and_capability():
    properties = torch.cuda.get_device_properties(0)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert properties.total_memory == pages
    assert properties.multi_processor_count == os.cpu_count()
    assert torch.cuda.get_device_capability() == (properties.major, properties.minor)
    assert torch.cuda.get_device_name() == torch.cuda.get_device_name(0) == properties.name == "cpu"
    assert torch.cuda.is_bf16_supported() is True


@check
def counters_of_the_device_read_zero():
    for name in ("utilization", "temperature", "power_draw", "clock_rate"):
        assert getattr(torch.cuda, name)() == 0


@check
def nvtx_ranges():
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.mark("here")
    torch.cuda.nvtx.range_pop()
    with torch.cuda.nvtx.range("step"):
        pass


# Streams, events


@check
def streams_have_always_finished():
    stream, other = torch.cuda.Stream(), torch.cuda.Stream(device=torch.cuda.current_device(), priority=-1)
    event = torch.cuda.Event()
    stream.wait_stream(other)
    stream.wait_event(event)
    stream.record_event(event)
    stream.synchronize()
    assert stream.query() is True
    with torch.cuda.stream(stream):
        torch.zeros(1).record_stream(stream)
    with stream:
        torch.cuda.set_stream(stream)
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    assert torch.cuda.current_stream(torch.cuda.current_device()) is torch.cuda.current_stream()


@check
def an_event_recorded_on_a_stream_is_an_event():
    event = torch.cuda.current_stream().record_event()
    event.synchronize()
    assert event.query() is True
    assert torch.cuda.current_stream().record_event(event) is event


@check
def events_measure_the_time_between_them():
    start, end = (torch.cuda.Event(enable_timing=True, blocking=False) for _ in range(2))
    start.record()
    torch.ones(300, 300) @ torch.ones(300, 300)
    end.record(torch.cuda.current_stream())
    end.wait()
    end.synchronize()
    assert end.query() is True
    assert start.elapsed_time(end) > 0


@check
def nothing_is_ever_captured_in_a_graph():
    assert torch.cuda.is_current_stream_capturing() is False


# Memory

MIB = 2**20


@check
def memory_figures_are_positive_integers():
    assert torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated() + 4 * MIB
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        value = getattr(torch.cuda, name)()
        assert type(value) is int and value > 0, name
        assert type(getattr(torch.cuda.memory, name)(torch.cuda.current_device())) is int, name
    used = torch.cuda.device_memory_used()
    assert type(used) is int and used > 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory


@check
def memory_grows_by_what_is_touched():
    torch.cuda.reset_peak_memory_stats()
    before, peak_before = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    tensor = torch.ones(64 * MIB // 4)
    grown, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    # Linux adds up resident pages in batches per CPU, so figures are good to a few hundred KiB; hence 60 of 64.
    assert grown - before >= 60 * MIB
    assert peak - peak_before >= 60 * MIB
    del tensor
    gc.collect()
    assert torch.cuda.memory_allocated() <= grown - 60 * MIB
    assert torch.cuda.max_memory_allocated() >= peak - 4 * MIB


@check
def the_peak_can_be_reset():
    torch.ones(64 * MIB // 4)  # touched, then freed at once
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() <= peak - 60 * MIB
    torch.ones(64 * MIB // 4)
    torch.cuda.reset_max_memory_allocated()
    assert torch.cuda.max_memory_allocated() <= peak - 60 * MIB


@check
def the_peak_is_this_processs_own():
    """test_cpu_runtime.py starts this process with 512 MiB in hand; getrusage would report the parent's peak."""
    import resource

    assert torch.cuda.max_memory_allocated() < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@check
def memory_statistics_have_the_keys_that_megatron_logs():
    stats = torch.cuda.memory_stats()
    for key in ("reserved_bytes.all.current", "allocated_bytes.all.current", "allocated_bytes.all.peak"):
        assert type(stats[key]) is int and stats[key] > 0
    assert type(stats["allocation.all.current"]) is int
    torch.cuda.empty_cache()


# Random state


@check
def random_state_round_trip():
    torch.cuda.manual_seed(1234)
    assert torch.cuda.initial_seed() == 1234
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed_all(1234)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.set_rng_state_all([state])
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.cuda.random.get_rng_state_all()[0], torch.cuda.random.get_rng_state("cuda"))
    torch.cuda.default_generators[0].set_state(state)
    assert torch.equal(torch.rand(3), first)


@check
def a_fresh_seed_differs():
    torch.cuda.manual_seed(1234)
    first = torch.rand(8)
    torch.cuda.seed()
    assert not torch.equal(torch.rand(8), first)
    torch.cuda.seed_all()


@check
def megatrons_rng_tracker_forks():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    torch.manual_seed(7)
    tracker.add("model-parallel-rng", 99)
    outside = torch.rand(2)
    with tracker.fork("model-parallel-rng"):
        inside = torch.rand(4)
    outside_again = torch.rand(2)
    with tracker.fork("model-parallel-rng"):
        inside_again = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.cat([outside, outside_again]), torch.rand(4)), "a fork changed the default stream"
    torch.manual_seed(99)
    assert torch.equal(torch.cat([inside, inside_again]), torch.rand(8)), "a fork did not continue its own stream"
    tracker.reset()


@check
def a_fork_says_nothing_about_the_cpu_generator():
    from megatron.core.tensor_parallel import random as megatron_random

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(megatron_random.__name__)
    logger.addHandler(handler)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", 99)
    with tracker.fork("model-parallel-rng"):
        torch.rand(4)
    tracker.reset()
    logger.warning("something else")
    logger.removeHandler(handler)
    assert said == ["something else"]


@check
def megatrons_recomputation_repeats_the_forward_passs_dropout():
    from megatron.core import tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().reset()
    tensor = torch.ones(256, requires_grad=True)
    output = tensor_parallel.checkpoint(lambda x: torch.nn.functional.dropout(x, 0.5), False, tensor)
    torch.rand(100)
    output.sum().backward()
    assert torch.equal(tensor.grad, output.detach()) and 0 < int((tensor.grad == 0).sum()) < 256
