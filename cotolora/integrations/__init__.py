"""CoTo in other people's training stacks. Each module imports its stack; nothing else imports them."""
