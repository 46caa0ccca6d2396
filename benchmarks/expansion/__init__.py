"""What an expanded vocabulary costs and brings, by initialisation of its rows and by what is trained first."""
