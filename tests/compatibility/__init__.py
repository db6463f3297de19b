"""Real artifacts in the engines that people serve with: loaded, run, compared with the prediction.

`make test-engines` runs it; pytest doesn't, for the engines take gigabytes and minutes.
"""
