"""What is wrong with an engine's answers: the judge, causes, smaller traces, coverage."""
