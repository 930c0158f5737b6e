"""What of Lightning's Trainer works with learned widths and both schedules: a table that runs fill in."""
