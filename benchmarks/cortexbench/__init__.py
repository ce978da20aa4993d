"""What an encoder is worth to a robot: tasks in a simulator, and demonstrations of them by experts."""
