_nanoclawctl() {
  local found current=${COMP_WORDS[COMP_CWORD]}
  found=$(nanoclawctl _complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null)
  COMPREPLY=()
  case $found in
  :files) compopt -o filenames 2> /dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
  :directories) compopt -o filenames 2> /dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
  ?*) mapfile -t COMPREPLY < <(cut -f 1 <<< "$found") ;;
  esac
}
complete -F _nanoclawctl nanoclawctl
# made by 'nanoclawctl completion bash'
