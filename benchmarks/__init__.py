"""What is learnt by executing: is it right, how fast, the report."""
