"""What continuous integration needs of a check: baselines, expected failures, JUnit XML, GitHub's summaries."""
