"""What is made of finished rows: runs compared with each other, their curves, one page of HTML."""
