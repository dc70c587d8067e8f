"""What executes an artifact, and where: runtimes, the job contract, targets."""
