"""What a run tells: metrics, the live table, the summary."""
