# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made for an installation: manual pages, and completion for bash, zsh and fish.

All of it comes from what the programs go by themselves: the shell's table of commands,
virtbackupd's command line, the settings. It is made when a package is built and is not kept; no
libvirt is needed.

python -m manual DIRECTORY      writes them below DIRECTORY, where /usr/share has them
"""
