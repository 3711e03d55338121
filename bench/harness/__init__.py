"""The benchmark: our engines and their peers, side by side in one run.

Each thing measured is a *subject* (an engine of ours, crun, Podman, a peer's
server) that offers *operations* under common names. The run goes round after
round through all subjects, a few calls each, in rotating order, so that drift
of the machine meets all of them alike. Figures are medians and p99 over all
rounds.
"""
