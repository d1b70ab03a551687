"""What is wrong with a machine, or between machines: probes that look, and verdicts that judge."""
