#compdef nanoclawctl
# To be put into a file named _nanoclawctl in $fpath, where the file is the function, or to be sourced.
_nanoclawctl() {
  local -a found
  found=("${(@f)$(nanoclawctl _complete "${(@)words[2,CURRENT]}" 2> /dev/null)}")
  case $found[1] in
  :files) _files ;;
  :directories) _files -/ ;;
  ?*) found=("${(@)found/$'\t'/:}"); _describe nanoclawctl found ;;
  esac
}
if [ "$funcstack[1]" = _nanoclawctl ]; then _nanoclawctl "$@"; else compdef _nanoclawctl nanoclawctl; fi
# made by 'nanoclawctl completion zsh'
