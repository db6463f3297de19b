"""How artifacts are judged: likelihood, regression cases, harness tasks, gates, localization."""
