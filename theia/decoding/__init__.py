"""What a student has learned from each teacher, shown as the teacher would show it."""
