"""Arms of a training recipe compared over seeds at equal compute: plan, runs, measurements, statistics, report."""
