"""What a user of a trained model holds, and how it is read from any folder or file that has one."""
