# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion for bash, zsh and fish.

That of ``virsh-backup`` asks the program (virtbackup/tools/virsh_complete.py), whose table of
commands knows all words, and the hypervisor's names; that of ``virtbackupd`` has its options in it.
"""

from manual import pages


def scripts() -> dict[str, str]:
    """Path below /usr/share -> script."""
    return {
        "bash-completion/completions/virsh-backup": _BASH,
        "bash-completion/completions/virtbackupd": _daemon_bash(),
        "fish/vendor_completions.d/virsh-backup.fish": _FISH,
        "fish/vendor_completions.d/virtbackupd.fish": _daemon_fish(),
        "zsh/site-functions/_virsh-backup": _ZSH,
        "zsh/site-functions/_virtbackupd": _daemon_zsh(),
    }


# --- virsh-backup ---------------------------------------------------------------------------------

_BASH = r"""# SPDX-License-Identifier: LGPL-2.1-or-later
# bash completion of virsh-backup. Made by python -m manual.

_virsh_backup() {
    local line=${COMP_LINE:0:COMP_POINT} before='' kind value open=1
    local word=${line##*[[:space:]]}
    # bash completes from behind the last of its word breaks on, unless there are quotes.
    if [[ $word != *[\'\"\\]* ]]; then
        before=${word%"${word##*["$COMP_WORDBREAKS"]}"}
    fi
    COMPREPLY=()
    {
        IFS= read -r kind || return 0
        if [[ $kind == files ]]; then
            compopt -o default
            return 0
        fi
        while IFS= read -r value; do
            value=${value%%$'\t'*}
            [[ $value == *[/=,] ]] || open=
            value=${value#"$before"}
            case $word in
                [\'\"]*) ;;
                *[\\\'\"]*) printf -v value %q "$value" ;;
                *) [[ $value == *[!A-Za-z0-9_@%+=:,./-]* ]] && printf -v value %q "$value" ;;
            esac
            COMPREPLY+=("$value")
        done
    } < <("${1/#\~/$HOME}" --complete "$line" 2>/dev/null </dev/null)
    if [[ $open ]]; then
        compopt -o nospace
    fi
} && complete -F _virsh_backup virsh-backup
"""

_ZSH = r"""#compdef virsh-backup
# SPDX-License-Identifier: LGPL-2.1-or-later
# zsh completion of virsh-backup. Made by python -m manual.

local line="${(j: :)words[1,CURRENT-1]} $QIPREFIX$PREFIX"
local -a answer whole open whole_shown open_shown
local entry value shown

answer=(
    "${(@f)$(_call_program candidates ${words[1]} --complete ${(q)line} 2>/dev/null </dev/null)}"
)
if [[ $answer[1] == files ]]; then
    [[ $PREFIX == --*=* ]] && compset -P 1 '*='
    _files
    return
fi
for entry in "${(@)answer[2,-1]}"; do
    value=${entry%%$'\t'*}
    shown=$value
    [[ $entry == *$'\t'* ]] && shown="${(r:24:)value} -- ${entry#*$'\t'}"
    if [[ $value == *[/=,] ]]; then
        open+=("$value") open_shown+=("$shown")
    else
        whole+=("$value") whole_shown+=("$shown")
    fi
done
local -a listed
[[ $answer == *$'\t'* ]] && listed=(-l)
compadd $listed -d whole_shown -a whole
compadd $listed -d open_shown -S '' -a open
"""

_FISH = r"""# SPDX-License-Identifier: LGPL-2.1-or-later
# fish completion of virsh-backup. Made by python -m manual.

function __virsh_backup_complete
    set -l line (commandline -cp)
    set -l program (commandline -opc)[1]
    set -l answer (command $program --complete "$line" 2>/dev/null </dev/null)
    switch "$answer[1]"
        case files
            set -l word (commandline -ct)
            set -l parts (string match -r -- '^(--[^=]*=)(.*)$' $word)
            if set -q parts[3]
                set word $parts[3]
            end
            string replace -r -- '^' "$parts[2]" (__fish_complete_path "$word")
        case values
            string join \n -- $answer[2..-1]
    end
end

complete -c virsh-backup -f -a '(__virsh_backup_complete)'
"""


# --- virtbackupd ----------------------------------------------------------------------------------


def _daemon_bash() -> str:
    words = " ".join(name for names, _, _ in pages.daemon_options() for name in names)
    return f"""# SPDX-License-Identifier: LGPL-2.1-or-later
# bash completion of virtbackupd. Made by python -m manual.

_virtbackupd() {{
    COMPREPLY=()
    case $3 in
        --config) compopt -o default ;;
        --uri | --listen) ;;
        *) mapfile -t COMPREPLY < <(compgen -W '{words}' -- "$2") ;;
    esac
}} && complete -F _virtbackupd virtbackupd
"""


def _daemon_zsh() -> str:
    specs = []
    for names, value, said in pages.daemon_options():
        said = "".join("\\" + char if char in "[]:\\" else char for char in said)
        said = said.replace("'", "'\\''")
        what = f":{value.lower()}:{'_files' if value == 'FILE' else ' '}" if value else ""
        specs += [f"    '{'*' if value else ''}{name}[{said}]{what}'" for name in names]
    return (
        "#compdef virtbackupd\n# SPDX-License-Identifier: LGPL-2.1-or-later\n"
        "# zsh completion of virtbackupd. Made by python -m manual.\n\n_arguments \\\n"
        + " \\\n".join(specs)
        + "\n"
    )


def _daemon_fish() -> str:
    lines = []
    for names, value, said in pages.daemon_options():
        flags = "".join(
            f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in names
        )
        takes = (" -r -F" if value == "FILE" else " -x") if value else ""
        said = said.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c virtbackupd{flags}{takes} -d '{said}'\n")
    return (
        "# SPDX-License-Identifier: LGPL-2.1-or-later\n"
        "# fish completion of virtbackupd. Made by python -m manual.\n\n"
        "complete -c virtbackupd -f\n" + "".join(lines)
    )
