function __nanoclawctl
  set -l current (commandline -ct)
  set -l found (nanoclawctl _complete (commandline -opc)[2..] "$current" 2> /dev/null)
  switch "$found[1]"
    case :files
      __fish_complete_path "$current"
    case :directories
      __fish_complete_directories "$current"
    case '*'
      printf '%s\n' $found
  end
end
complete -c nanoclawctl -f -a '(__nanoclawctl)'
# made by 'nanoclawctl completion fish'
