"""Replay of recorded request traces through the production manager: `kvmanager replay`.

    traces.py      what a trace file says, as requests; token ids that stand for its block hashes
    meter.py       the manager's public calls with a stopwatch beside them, and the counts of a run
    sequential.py  one request at a time: comparable with any cache simulator, to the page
    scheduler.py   many at a time: arrivals, chunked prefill, decode, preemption, several pools
    report.py      what is printed, for people and for programs; the plot of pool use
    command.py     the command line

Everything goes through `KVManager`'s public methods; nothing here looks into the state.
"""
