"""`python -m benchmarks.chaos --serve`: an endpoint that is killed, flooded, left and fed with damaged deltas."""

from benchmarks.chaos_serve.slices import campaign

__all__ = ["campaign"]
